"""`medv generate`: the same answers alone, shared out, and stopped at any point; also by a checkpoint of transformers."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from command import run
from launched import launch, start_command
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medv.data.example import Example, Turn
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.baselines import CheckpointAnswerer, availability
from medv.evaluation.benchmark import answer_file

COUNT = 11


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.question_folder(tmp_path_factory.mktemp("questions"), COUNT)


def command(questions, model_dir, out, *more):
    options = {"--questions": questions / "questions.jsonl", "--images": questions, "--model": model_dir, "--out": out}
    sizes = ("--gen-length", "8", "--block-length", "8", "--steps", "8", "--temperature", "0.5", "--batch-size", "2")
    return [str(part) for pair in options.items() for part in pair] + [*sizes, *more]


def told(path: Path) -> list:
    return [[row[key] for key in ("question_id", "text", "forwards", "settings")] for row in map(json.loads, path.open())]


@pytest.fixture(scope="module")
def alone(questions, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "answers.jsonl"
    assert run("generate", *command(questions, model_dir, out)).exit_code == 0
    return out


def test_every_answer_says_its_settings_forwards_and_seconds(alone):
    rows = [json.loads(line) for line in alone.open()]
    assert [row["question_id"] for row in rows] == [f"q{number}" for number in range(COUNT)]
    for row in rows:
        assert row["forwards"] >= 1 and row["seconds"] > 0
        assert row["settings"]["gen_length"] == 8 and row["settings"]["temperature"] == 0.5


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one_in_order(questions, model_dir, alone, tmp_path):
    out = tmp_path / "shared" / "answers.jsonl"
    out.parent.mkdir()
    launch("generate", tmp_path / "processes", arguments=command(questions, model_dir, out))
    assert told(out) == told(alone) and list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_a_run_killed_at_any_answer_goes_on_to_the_same_file(model_dir, questions, alone, tmp_path):
    out = tmp_path / "answers.jsonl"
    process = start_command(tmp_path / "said", "generate", *command(questions, model_dir, out))
    while process.is_alive() and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.kill()
    process.join()
    kept = out.read_bytes().splitlines(keepends=True)
    assert run("generate", *command(questions, model_dir, out)).exit_code == 0
    assert told(out) == told(alone)
    whole = [line for line in kept if line.endswith(b"\n")]
    assert out.read_bytes().startswith(b"".join(whole)), "an answer that was there was asked again"


class Counting(Answerer):
    """Notes which questions it was asked."""

    def answer(self, examples, config, **options):
        asked.extend(example.id for example in examples)
        return super().answer(examples, config, **options)


asked: list[str] = []


def test_parts_of_a_killed_shared_run_are_used_and_only_the_missing_batches_are_asked(model_dir, tmp_path):
    out, way = tmp_path / "answers.jsonl", (Counting.load(model_dir), SamplerConfig(8, 8, 8))
    examples = tiny.examples(6)
    answer_file(examples, *way, out, batch_size=2, quiet=True)
    lines, wanted = out.read_text().splitlines(keepends=True), told(out)
    out.unlink()
    (tmp_path / "answers.jsonl.part0").write_text("".join(lines[:2]))
    (tmp_path / "answers.jsonl.part1").write_text(lines[2] + lines[3][:30])
    asked.clear()
    answer_file(examples, *way, out, batch_size=2, quiet=True)
    assert told(out) == wanted and asked == [example.id for example in examples[2:]]
    assert list(tmp_path.iterdir()) == [out]


def test_two_questions_of_one_id_are_refused_before_one_gets_the_answer_of_the_other(model_dir, tmp_path):
    one, other = tiny.examples(2)
    with pytest.raises(ValueError, match=f"two questions have the id {one.id}"):
        answer_file([one, replace(other, id=one.id)], Answerer.load(model_dir), SamplerConfig(8, 8, 8), tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaVA of a few thousand random weights with its processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("llava")
    words = ["<unk>", "<s>", "</s>", "<image>", "what", "is", "shown", "?", "USER", "ASSISTANT", ":", "a", "mass"]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **size),
        text_config=LlamaConfig(vocab_size=len(words), eos_token_id=2, pad_token_id=2, num_key_value_heads=2, **size),
        image_token_id=3,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    sides = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    template = (
        "{% for m in messages %}USER : {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(**sides),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def test_any_image_text_to_text_checkpoint_answers_and_resumes(checkpoint, tmp_path):
    turns = (Turn("user", "what is shown ?"),)
    examples = [Example(f"q{n}", lambda n=n: Image.new("RGB", (20, 20), (60 * n, 90, 9)), turns) for n in range(3)]
    way, out = (CheckpointAnswerer.load(str(checkpoint)), SamplerConfig(5, 5, 5)), tmp_path / "answers.jsonl"
    assert availability(str(checkpoint)) == "on this machine"
    assert answer_file(examples, *way, out, batch_size=2, quiet=True) == 3
    rows = [json.loads(line) for line in out.open()]
    assert [row["settings"]["max_new_tokens"] for row in rows] == [5, 5, 5]
    assert all(1 <= row["forwards"] <= 5 and row["seconds"] > 0 for row in rows)
    before = out.read_bytes()
    answer_file(examples, *way, out, batch_size=2, quiet=True)
    assert out.read_bytes() == before


def test_a_checkpoint_is_asked_for_any_number_of_tokens(checkpoint, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "image": "a.png", "text": "what is shown ?"}\n')
    command = ["generate", "--questions", tmp_path / "q.jsonl", "--images", tmp_path, "--checkpoint", checkpoint]
    done = run(*command, "--out", tmp_path / "out.jsonl", "--gen-length", 5)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["settings"]["max_new_tokens"] == 5


def test_a_checkpoint_that_is_not_here_says_so():
    assert availability("nobody/nothing").startswith("not available")
    assert availability(None).startswith("not available")
