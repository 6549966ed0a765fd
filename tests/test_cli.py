"""The command line as a person meets it: answers, one sentence for what cannot be done, JSON where asked."""

import json
import os
import re
import time

import pytest
from command import SHORT, run, save_picture
from PIL import Image

from medv.phantoms.pictures import phantom_image, phantom_scene


@pytest.mark.parametrize(
    ("kind", "name"), [("rgb", "a.png"), ("rgb", "a.jpg"), ("sixteen-bit", "b.png"), ("rgba", "c.png"), ("dicom", "d.dcm")]
)
def test_ask_answers_about_every_kind_of_image(tmp_path, model_dir, kind, name):
    save_picture(tmp_path / name, kind)
    done = run("ask", tmp_path / name, "What is shown?", "--model", model_dir, "--json", *SHORT)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["forwards"] <= 4


def broken(tmp_path, kind):
    path = tmp_path / "image.png"
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "truncated":
        save_picture(path, "rgb")
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "too wide":
        Image.new("L", (20_000, 2)).save(path)
    return path


@pytest.mark.parametrize("kind", ["text", "truncated", "too wide", "missing"])
def test_a_bad_image_is_refused_in_one_sentence_with_exit_code_2(tmp_path, model_dir, kind):
    path = broken(tmp_path, kind)
    done = run("ask", path, "What is shown?", "--model", model_dir, *SHORT)
    assert done.exit_code == 2
    assert done.stderr.startswith("medv: ") and done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize(
    ("question", "options", "word"),
    [
        (" ", SHORT, "empty"),
        ("What?", ("--gen-length", "10", "--block-length", "4", "--steps", "10"), "does not divide"),
        ("What?", ("--gen-length", "8", "--block-length", "4", "--steps", "3"), "not a multiple"),
        ("x" * 50_000, SHORT, "shorten the question"),
    ],
)
def test_a_bad_question_or_setting_is_refused_in_one_sentence(tmp_path, model_dir, question, options, word):
    save_picture(tmp_path / "a.png", "rgb")
    done = run("ask", tmp_path / "a.png", question, "--model", model_dir, *options)
    assert done.exit_code == 2
    assert word in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_without_a_model_is_refused(tmp_path):
    save_picture(tmp_path / "a.png", "rgb")
    done = run("ask", tmp_path / "a.png", "What?", "--model", tmp_path, *SHORT)
    assert done.exit_code == 2 and "no config.json" in done.stderr


@pytest.fixture
def benchmark(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for index in range(5):
        phantom_image(phantom_scene("test", index), 32).save(images / f"{index}.png")
        rows.append({"question_id": index, "image": f"{index}.png", "text": "What is shown?\n<image>"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return questions, images


def generate(benchmark, model_dir, out, *more):
    questions, images = benchmark
    options = ("--questions", questions, "--images", images, "--model", model_dir, "--out", out)
    return run("generate", *options, "--batch-size", "2", *SHORT, *more)


def test_generation_resumes_where_it_stopped(tmp_path, benchmark, model_dir):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate(benchmark, model_dir, whole).exit_code == 0
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    torn.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third answer
    assert generate(benchmark, model_dir, torn).exit_code == 0
    told = [[json.loads(line)[key] for key in ("question_id", "text", "forwards")] for line in lines]
    again = [[json.loads(line)[key] for key in ("question_id", "text", "forwards")] for line in torn.open()]
    assert told == again


def test_generation_refuses_answers_of_other_settings(tmp_path, benchmark, model_dir):
    out = tmp_path / "answers.jsonl"
    assert generate(benchmark, model_dir, out).exit_code == 0
    before = out.read_text()
    done = generate(benchmark, model_dir, out, "--seed", "1")
    assert done.exit_code == 2 and "settings.seed 0, now 1" in done.stderr
    assert out.read_text() == before


def test_a_question_file_cannot_reach_outside_its_image_folder(tmp_path, benchmark, model_dir):
    questions, _ = benchmark
    questions.write_text(json.dumps({"question_id": 0, "image": "../questions.jsonl", "text": "What?"}))
    assert generate(benchmark, model_dir, tmp_path / "out.jsonl").exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gen-length", "252", "--block-length", "4", "--steps", "63"), "but this model reads 256"),
        (("--gen-length", "10000000019"), "--gen-length|gen_length"),
        (("--steps", "1000000000"), "steps"),
        (("--gen-length", "0"), "gen_length"),
    ],
)
def test_a_canvas_longer_than_the_model_reads_is_refused_before_anything_is_written(
    tmp_path, benchmark, model_dir, options, words
):
    begun = time.process_time()
    done = generate(benchmark, model_dir, tmp_path / "out.jsonl", *options)
    assert done.exit_code == 2 and re.search(words, done.stderr) and done.stderr.count("medv: ") == 1
    assert not (tmp_path / "out.jsonl").exists() and time.process_time() - begun < 10


def test_one_question_of_a_hundred_thousand_characters_is_refused_by_its_id(tmp_path, benchmark, model_dir):
    questions, _ = benchmark
    with questions.open("a") as stream:
        stream.write(json.dumps({"question_id": "long", "image": "0.png", "text": "x" * 100_000}))
    begun = time.process_time()
    done = generate(benchmark, model_dir, tmp_path / "out.jsonl")
    assert done.exit_code == 2 and "question long: the prompt has" in done.stderr
    assert not (tmp_path / "out.jsonl").exists() and time.process_time() - begun < 10


@pytest.mark.slow
def test_images_that_cannot_be_read_stop_a_benchmark_or_are_left_out_counted_and_listed(tmp_path, benchmark, model_dir):
    out, (_, images) = tmp_path / "out.jsonl", benchmark
    whole = tmp_path / "whole.jsonl"
    assert generate(benchmark, model_dir, whole).exit_code == 0
    (images / "1.png").write_bytes(b"broken")
    (images / "3.png").unlink()
    os.mkfifo(images / "3.png")
    done = generate(benchmark, model_dir, out)
    assert done.exit_code == 2 and "question 1" in done.stderr and "--skip-corrupt" in done.stderr
    assert not out.exists()
    done = generate(benchmark, model_dir, out, "--skip-corrupt")
    listed = out.with_name("out.jsonl.skipped")
    assert done.exit_code == 0 and "2 questions were left out" in done.stderr and str(listed) in done.stderr
    assert [json.loads(line)["question_id"] for line in listed.open()] == ["1", "3"]
    texts = {row["question_id"]: row["text"] for row in map(json.loads, whole.open())}
    assert [(row["question_id"], row["text"]) for row in map(json.loads, out.open())] == [(n, texts[n]) for n in "024"]
    before = out.read_bytes(), listed.read_bytes()
    assert generate(benchmark, model_dir, out, "--skip-corrupt").exit_code == 0
    assert (out.read_bytes(), listed.read_bytes()) == before
    out.write_bytes(b"".join(before[0].splitlines(keepends=True)[:1]))  # stopped after the first
    assert generate(benchmark, model_dir, out, "--skip-corrupt").exit_code == 0
    assert [json.loads(line)["question_id"] for line in out.open()] == ["0", "2", "4"]
    listed.write_text("my notes")
    assert generate(benchmark, model_dir, out, "--skip-corrupt").exit_code == 2
    assert listed.read_text() == "my notes"


def test_a_benchmark_none_of_whose_images_can_be_read_is_refused(tmp_path, benchmark, model_dir):
    for image in benchmark[1].iterdir():
        image.write_bytes(b"")
    done = generate(benchmark, model_dir, tmp_path / "out.jsonl", "--skip-corrupt")
    assert done.exit_code == 2 and "none of the 5 images can be read" in done.stderr


def test_images_may_be_links_into_a_named_root(tmp_path, benchmark, model_dir):
    _, images = benchmark
    store = tmp_path / "blobs"
    store.mkdir()
    (images / "2.png").rename(store / "sha")
    (images / "2.png").symlink_to("../blobs/sha")
    done = generate(benchmark, model_dir, tmp_path / "out.jsonl")
    assert done.exit_code == 2 and "--image-root" in done.stderr
    assert generate(benchmark, model_dir, tmp_path / "out.jsonl", "--image-root", store).exit_code == 0


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_answers_are_not_written_over_what_is_no_file(tmp_path, benchmark, model_dir, kind):
    out = tmp_path / "out"
    out.mkdir() if kind == "folder" else os.mkfifo(out)
    done = generate(benchmark, model_dir, out)
    assert done.exit_code == 2 and out.name in done.stderr and not out.is_file()


@pytest.mark.parametrize("target", ["folder.html", "pipe.json", "file/a.html", "a.txt"])
def test_a_trace_to_what_cannot_be_written_is_refused_before_the_answer(tmp_path, model_dir, target):
    save_picture(tmp_path / "a.png", "rgb")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.json")
    done = run("ask", tmp_path / "a.png", "What?", "--model", model_dir, "--trace", tmp_path / target, *SHORT)
    assert done.exit_code == 2 and not done.stdout and done.stderr.count("\n") == 1


def test_a_question_that_is_no_text_is_refused(tmp_path, model_dir):
    save_picture(tmp_path / "a.png", "rgb")
    done = run("ask", tmp_path / "a.png", "What is gez\udce4hlt?", "--model", model_dir, *SHORT)
    assert done.exit_code == 2 and "\\udce4" in done.stderr and done.stderr.count("\n") == 1


def test_unknown_options_profiles_and_stages_are_errors(tmp_path):
    assert run("ask", "a.png", "q", "--threshold", "0.9").exit_code == 2
    assert "unknown profile" in run("train", "vqa", "--profile", "huge", "--out", tmp_path).stderr
    assert "No such command 'sft'" in run("train", "sft", "--out", tmp_path / "x").stderr


def test_doctor_prints_json():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["torch"].startswith("2.13")
