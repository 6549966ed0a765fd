"""The weights that come with the package: they can be made again, they load, and the finished model has learned to look."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import medv
from medv.checkpoints.bundled import BUNDLED, bundled, load_model
from medv.companion.audit.controls import blinded
from medv.companion.towers.pretrain import PARTS, pretrain
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import text_set, vqa_set
from medv.profiles import get_profile

SMOKE = get_profile("smoke")
NARROW = {f"{part}{size}": 32 for part in ("", "vision_") for size in ("hidden_size", "intermediate_size")}
SHALLOW = {f"{part}{count}": 2 for part in ("", "vision_") for count in ("layers", "heads")}
SMALL = replace(
    SMOKE,
    model=replace(SMOKE.model, **NARROW, **SHALLOW),
    pretrain=dict.fromkeys(SMOKE.pretrain, 1) | {"tower_images": 64, "texts": 300},
)
WEIGHTS = Path(medv.__file__).parent / "weights"


def few_texts(split, count, **options):
    """As many texts as asked for, but eight to validate on."""
    return text_set(split, count if split == "train" else 8, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medv.companion.towers.pretrain.text_set", few_texts)
        patch.setattr("medv.companion.towers.pretrain.BRIEF_HELD", 100)
        patch.setattr("medv.companion.towers.vision.HELD_OUT", 100)
        pretrain(SMALL, folder, quiet=True)
    return folder


@pytest.mark.slow
def test_every_part_is_made_and_exported_in_half_precision(made):
    for part in PARTS:
        assert (made / "weights" / part / "part.json").exists()
    for file in (made / "weights").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_a_part_that_is_there_is_kept(made):
    before = (made / "vision_tower" / "model.safetensors").stat().st_mtime_ns
    pretrain(SMALL, made, quiet=True)
    assert (made / "vision_tower" / "model.safetensors").stat().st_mtime_ns == before
    without = replace(SMALL, pretrain=dict.fromkeys(SMOKE.pretrain, 1) | {"tower_images": 64})
    for other, said in (((SMALL, 9), "seed 0, now 9"), ((without, 0), "steps.texts 300, now None")):
        with pytest.raises(ValueError, match=said):
            pretrain(other[0], made, seed=other[1], quiet=True)


def test_a_profile_without_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile paper begins from towers trained elsewhere"):
        pretrain(get_profile("paper"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown part"):
        pretrain(get_profile("smoke"), tmp_path, only=["tower"])


@pytest.mark.parametrize("part", BUNDLED)
def test_each_bundled_part_says_how_it_was_made(part):
    facts = json.loads((bundled(part) / "part.json").read_text())
    assert facts["profile"]["name"] == "tiny" and facts["seed"] == 0


def test_the_bundled_weights_are_small_and_hold_no_pickle():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


@pytest.mark.slow
def test_the_bundled_model_looks_at_the_image():
    torch.set_num_threads(1)
    model, processor = load_model(bundled("tiny_model"))
    kinds = ("modality", "side", "level", "size")
    questions = [e for e in vqa_set("validation", 400) if e.meta["kind"] in kinds and e.answer_type == "OPEN"][:80]
    config = SamplerConfig(8, 8, 8)
    seen, blind = (
        [a.text for a in Answerer(model, processor).answer(asked, config, quiet=True)]
        for asked in (questions, blinded(questions))
    )
    right = [sum(said == e.answer for said, e in zip(texts, questions, strict=True)) for texts in (seen, blind)]
    assert right[0] >= 72 and right[1] <= 40


def test_a_word_has_the_same_token_alone_and_in_a_sentence():
    tokenizer = AutoTokenizer.from_pretrained(bundled("tokenizer"))
    alone = tokenizer.encode("left", add_special_tokens=False)
    assert len(alone) == 1 and alone[0] in tokenizer.encode("a nodule on the left.", add_special_tokens=False)
