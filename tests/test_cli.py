"""The command line as a person meets it: answers, one sentence for what cannot be done, JSON where asked."""

import json

import numpy as np
import pydicom
import pytest
import tiny
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from typer.testing import CliRunner

from medv.cli import app
from medv.data.phantoms import phantom_image, phantom_scene

SHORT = ("--gen-length", "4", "--block-length", "4", "--steps", "4")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save_dicom(path):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 30, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.WindowCenter, data.WindowWidth = 500, 1000
    data.PixelData = np.arange(1200, dtype=np.uint16).tobytes()
    pydicom.dcmwrite(path, data)


def save_picture(path, kind):
    phantom = phantom_image(phantom_scene("test", 1), 96)
    if kind == "dicom":
        save_dicom(path)
    elif kind == "sixteen-bit":
        Image.fromarray(np.asarray(phantom.convert("L")).astype(np.uint16) * 257).save(path)
    elif kind == "rgba":
        phantom.convert("RGBA").save(path)
    else:
        phantom.save(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("rgb", "a.png"), ("rgb", "a.jpg"), ("sixteen-bit", "b.png"), ("rgba", "c.png"), ("dicom", "d.dcm")],
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
    assert done.exit_code == 2 and "was made from something else" in done.stderr
    assert out.read_text() == before


def test_a_question_file_cannot_reach_outside_its_image_folder(tmp_path, benchmark, model_dir):
    questions, _ = benchmark
    questions.write_text(json.dumps({"question_id": 0, "image": "../questions.jsonl", "text": "What?"}))
    assert generate(benchmark, model_dir, tmp_path / "out.jsonl").exit_code == 2


def test_unknown_options_profiles_and_stages_are_errors(tmp_path):
    assert run("ask", "a.png", "q", "--threshold", "0.9").exit_code == 2
    assert "unknown profile" in run("train", "vqa", "--profile", "huge", "--out", tmp_path).stderr
    assert "No such command 'sft'" in run("train", "sft", "--out", tmp_path / "x").stderr


def test_doctor_prints_json():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["torch"].startswith("2.13")
