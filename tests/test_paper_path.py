"""The `paper` profile from end to end on a model of its kind: the released layout and vocabulary, small in width and depth.

convert -> align -> instruct -> vqa -> generate -> evaluate, from a LLaDA-8B checkpoint with OLMo names, a SigLIP release and
data in the published formats. What is scaled down are widths, depths, batches and the number of tiles; the vocabulary of
126,464 rows, the special ids, the image modes and every file format are the real ones. Nothing is learned here.
"""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from medv.checkpoints.bundled import load_model
from medv.cli import app
from medv.data.chat import SpecialTokens
from medv.profiles import PAPER
from medv.training.examples import TrainingData
from medv.training.launch import RunOptions
from medv.training.stages import run_stage

ROWS, WIDTH, LAYERS = 126_464, 32, 2
SPECIAL = {
    "<|startoftext|>": 126_080,
    "<|endoftext|>": 126_081,
    "<|mdm_mask|>": 126_336,
    "<|start_header_id|>": 126_346,
    "<|end_header_id|>": 126_347,
    "<|eot_id|>": 126_348,
}
IMAGES = {
    "image_aspect_ratio": "anyres_max_4",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "(1x1),...,(1x2)",
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """LLaDA's 126,349 ids: bytes, words that nobody uses, the special tokens where they belong."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    taken = {number: string for string, number in SPECIAL.items()}
    for number in range(len(alphabet), max(taken) + 1):
        vocabulary[taken.get(number, f"<unused_{number}>")] = number
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(string, special=True) for string in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def write_llada(folder):
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (WIDTH, WIDTH))
    shapes = square | {"ff_proj": (64, WIDTH), "up_proj": (64, WIDTH), "ff_out": (WIDTH, 64)}
    tensors = {"wte": (ROWS, WIDTH), "ff_out": (ROWS, WIDTH)}
    tensors |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    weights = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in tensors.items()}
    norms = ("ln_f", *(f"blocks.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ff_norm")))
    weights |= {name: torch.ones(WIDTH) for name in norms}
    save_file({f"model.transformer.{k}.weight": v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")
    config = {"d_model": WIDTH, "mlp_hidden_size": 64, "n_layers": LAYERS, "n_heads": 4, "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS, "bos_token_id": 128000}))
    tokenizer().save_pretrained(folder)


def write_siglip(folder):
    from transformers import SiglipConfig, SiglipModel

    vision = {"image_size": 384, "patch_size": 14, "hidden_size": WIDTH, "intermediate_size": 48}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(vision_config=vision | heads, text_config=text)).save_pretrained(folder)


def write_data(folder):
    """Two images and the three stages' files, as published."""
    (folder / "images").mkdir(parents=True)
    for name, size in (("a.jpg", (60, 40)), ("b.jpg", (40, 90))):
        noise = np.random.default_rng(len(name)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / name)
    said = [("human", "<image>\nWhat is shown?"), ("gpt", "A chest X-ray."), ("human", "Which side?"), ("gpt", "The left.")]
    talk = [{"from": who, "value": text} for who, text in said]
    rows = [{"id": str(i), "image": f"{name}.jpg", "conversations": talk} for i, name in enumerate("ab")]
    (folder / "llava_med_alignment_500k.json").write_text(json.dumps([row | {"conversations": talk[:2]} for row in rows]))
    (folder / "llava_med_instruct_60k.json").write_text(json.dumps(rows))
    base = {"image_organ": "CHEST", "image_case_url": "", "question_rephrase": "NULL", "phrase_type": "freeform"}
    questions = [("a", "Is there an effusion?", "yes", "CLOSED", "PRES"), ("b", "Where is it?", "left lung", "OPEN", "POS")]
    rad = [
        base
        | {
            "qid": i,
            "image_name": f"{name}.jpg",
            "question": asked,
            "answer": said,
            "answer_type": kind,
            "question_type": type_,
        }
        for i, (name, asked, said, kind, type_) in enumerate(questions)
    ]
    for split, first in (("trainset", 0), ("testset", 10)):
        (folder / f"{split}.json").write_text(json.dumps([row | {"qid": row["qid"] + first} for row in rad]))


def medv(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A LLaDA-V style checkpoint, put together from the releases that training starts from, after one `medv convert`."""
    root = tmp_path_factory.mktemp("paper")
    write_llada(root / "llada")
    write_siglip(root / "siglip")
    write_data(root / "data")
    medv("convert", root / "llada", root / "language")
    medv("convert", root / "siglip", root / "vision")
    return root


@pytest.mark.slow
def test_the_paper_profile_runs_end_to_end_on_its_own_formats(converted):
    from medv.checkpoints.assembly import assemble, new_processor
    from medv.checkpoints.released import image_settings

    root = converted
    model = assemble(root / "language", root / "vision", seed=0, **image_settings(IMAGES, 384))
    new_processor(tokenizer_with_image(root), model.config, system=PAPER.system).save_pretrained(root / "start")
    model.save_pretrained(root / "start")
    short = {name: replace(recipe, batch_size=2, epochs=1) for name, recipe in PAPER.stages.items()}
    profile, init = replace(PAPER, stages=short), root / "start"
    sets = {"align": "llava_med_align", "instruct": "llava_med_instruct", "vqa": "vqa_rad"}
    for stage, data in sets.items():
        source = TrainingData(data, root / "data")
        facts = run_stage(stage, profile, root / stage, RunOptions(quiet=True), data=source, init=init)
        assert facts["steps"] == 1 and np.isfinite(facts["loss"])
        init = root / stage
    settings = ("--gen-length", 8, "--block-length", 4, "--steps", 4)
    answers = root / "answers.jsonl"
    medv("generate", "--data", "vqa_rad", "--questions", root / "data/testset.json", "--images", root / "data/images",
         "--model", root / "vqa", "--out", answers, *settings)  # fmt: skip
    scores = json.loads(medv("evaluate", "vqa", "--references", root / "data/testset.json", "--predictions", answers, "--json"))
    assert scores["n_closed"] == scores["n_open"] == 1
    medv("convert", root / "vqa", root / "released", "--to", "lladav")
    medv("convert", root / "released", root / "again", "--vision", root / "siglip")
    one, other = load_model(root / "vqa")[0].state_dict(), load_model(root / "again")[0].state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tokenizer_with_image(root):
    """The tokenizer that conversion left beside the language tower: the released ids and the image placeholder."""
    loaded = PreTrainedTokenizerFast.from_pretrained(root / "language")
    special = SpecialTokens.of(loaded)
    assert special.image == 126_349 and special.end_of_turn == SPECIAL["<|eot_id|>"]
    return loaded
