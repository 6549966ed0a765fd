"""The `paper` profile from end to end on a model of its kind: the released layout and vocabulary, small in width and depth.

convert -> align -> instruct -> vqa -> generate -> evaluate, from a LLaDA-8B checkpoint with OLMo names, a SigLIP release and
data in the published formats. What is scaled down are widths, depths, batches and the number of tiles; the vocabulary of
126,464 rows, the special ids, the image modes and every file format are the real ones. Nothing is learned here.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from paper_world import IMAGES, SPECIAL, medv, write_llada, write_siglip
from PIL import Image
from transformers import PreTrainedTokenizerFast

from medv.checkpoints.bundled import load_model
from medv.data.chat import SpecialTokens
from medv.profiles import PAPER
from medv.training.examples import TrainingData
from medv.training.launch import RunOptions
from medv.training.stages import run_stage


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
