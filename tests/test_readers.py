"""Readers of the published formats: the counts of Table 8, every known quirk, and errors that say where and what."""

import json

import numpy as np
import pytest
from published import DATA, needs_data
from rich.console import Console

from medv.companion.audit.check import check_dataset, render_check
from medv.data.readers import DATASETS, read_dataset
from medv.data.rows import read_rows
from medv.reading import DataError


def write(path, rows, *, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows), encoding="utf-8")
    return path


def read(name, path, **options):
    return DATASETS[name].read(path, **options)


def rad_row(**fields):
    row = {"qid": 1, "image_name": "a.jpg", "question": "Is it?", "answer": "yes", "answer_type": "CLOSED"}
    return {**row, "phrase_type": "freeform", "image_organ": "HEAD", "question_type": "PRES", **fields}


def dialogue(*texts, key="conversations", **fields):
    spoken = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "p1", "image": "p1.jpg", key: spoken, **fields}


# Rows, closed questions and images.
COUNTS = {
    "vqa_rad": {"train": (1797, 1027, 313), "test": (451, 272, 203)},
    "slake": {"train": (4919, 1943, 450), "validation": (1053, 422, 96), "test": (1061, 416, 96)},
    "pathvqa": {"train": (19755, 9806, 2599), "val": (6279, 3135, 832), "test": (6761, 3391, 858)},
    "qa50": {"test": (193, 0, 50)},
    "llava_med_instruct": {"train": (8, 0, 8)},
}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("name", "split"), [(name, split) for name, splits in COUNTS.items() for split in splits])
def test_the_published_files_have_the_published_counts(name, split):
    rows, closed, images = COUNTS[name][split]
    examples = read_dataset(name, DATA / name, split)
    assert len(examples) == rows
    assert sum(e.answer_type == "CLOSED" for e in examples) == closed
    assert len({e.meta["image"] for e in examples}) == images
    assert len({e.id for e in examples}) == rows
    assert not any("<image>" in t.text or "\t" in t.text or t.text != t.text.strip() for e in examples for t in e.turns)


@pytest.mark.slow
@needs_data
def test_every_vqa_rad_image_exists_and_frame_rows_never_enter_training():
    train = read_dataset("vqa-rad", DATA / "vqa_rad", "train")
    assert all(e.image.is_file() for e in train)
    assert {e.meta["phrase_type"] for e in train} == {"freeform", "para"}
    assert len(read_dataset("vqa_rad", DATA / "vqa_rad", all_rows=True)) == 3064


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("split", "left"), [("train", 19654), ("val", 6259), ("test", 6719)])
def test_both_pathvqa_formats_are_the_same_examples_and_duplicates_can_go(split, left):
    lines = read("pathvqa", DATA / f"pathvqa/{split}.jsonl")
    assert lines == read("pathvqa", DATA / f"pathvqa/lxmert/pvqa_{split}.json")
    assert len(read("pathvqa", DATA / f"pathvqa/{split}.jsonl", drop_duplicates=True)) == left


@pytest.mark.slow
@needs_data
def test_slake_speaks_english_chinese_or_both():
    by_language = {
        language: read_dataset("slake", DATA / "slake", "test", language=language) for language in ("en", "zh", "all")
    }
    assert len(by_language["en"]) + len(by_language["zh"]) == len(by_language["all"]) == 2094
    assert all(e.question.isascii() for e in by_language["en"])
    assert not any(e.question.isascii() for e in by_language["zh"])


@needs_data
def test_the_empty_slake_answer_is_kept():
    assert [e.id for e in read_dataset("slake", DATA / "slake") if not e.answer] == ["1622"]


@needs_data
def test_the_chat_benchmark_has_the_counts_of_table_1_in_either_layout(tmp_path):
    path = DATA / "qa50/llava_med_eval_qa50_qa.jsonl"
    examples = read("qa50", path)
    domains = [e.meta["domain"] for e in examples]
    assert [domains.count(d) for d in DATASETS["qa50"].domains] == [37, 38, 44, 34, 40]
    pretty = tmp_path / "pretty.json"
    pretty.write_text("".join(json.dumps(row, indent=2) + "\n" for row in read_rows(path)), encoding="utf-8")
    assert read("qa50", pretty) == examples


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["vqa_rad", "slake", "pathvqa", "qa50"])
def test_the_check_agrees_with_the_paper_but_for_the_cell_it_misprints(name):
    result = check_dataset(name, DATA / name)
    assert result.matches
    differing = [(c.split, c.quantity, c.counted, c.paper) for c in result.counts if c.paper not in (None, c.counted)]
    assert differing == ([("validation", "images", 832, 858)] if name == "pathvqa" else [])
    console = Console(width=200)
    with console.capture() as captured:
        render_check(result, console)
    assert "match" in captured.get()
    json.dumps(result.to_dict())


def test_the_check_reports_what_is_odd(tmp_path):
    (tmp_path / "images").mkdir()
    rows = [rad_row(), rad_row(qid=2), rad_row(qid=3, answer="no"), rad_row(qid=3, question="?", answer="")]
    write(tmp_path / "testset.json", rows)
    result = check_dataset("vqa_rad", tmp_path)
    assert not result.matches
    said = "\n".join(result.problems)
    for words in ("train: ", "1 of 1 images are missing", "1 rows repeat", "several answers", "1 ids", "1 answers are empty"):
        assert words in said
    with pytest.raises(DataError, match="expected trainset"):
        check_dataset("vqa_rad", tmp_path / "images")


def test_nothing_matches_where_the_paper_has_no_count(tmp_path):
    write(tmp_path / "alignment" / "llava_med_alignment_500k.json", [dialogue("<image>", "A caption.")])
    result = check_dataset("llava_med_align", tmp_path)
    assert result.matches is None and result.to_dict()["matches"] is None and result.counts


def test_vqa_rad_quirks_are_mended(tmp_path):
    rows = [
        rad_row(answer=3, answer_type="CLOSED "),
        rad_row(question="the kidneys \tbladder\tor ureters?"),
        rad_row(phrase_type="frame"),
    ]
    first, second = read("vqa_rad", write(tmp_path / "trainset.json", rows))
    assert (first.answer, first.answer_type) == ("3", "CLOSED")
    assert second.question == "the kidneys, bladder, or ureters?"


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
@pytest.mark.parametrize("first", ["<image>\nWhat?", "What?\n<image>", "What?"])
def test_llava_med_dialogues_lose_the_placeholder_wherever_it_stands(tmp_path, key, first):
    path = write(tmp_path / "llava_med_instruct_60k.json", [dialogue(first, "A lung.", "Which?", "Left\tright.", key=key)])
    (example,) = read_dataset("llava_med_instruct", tmp_path)
    assert [t.text for t in example.turns] == ["What?", "A lung.", "Which?", "Left\tright."]
    assert (example.id, example.image, example.meta["image"]) == ("p1", None, "p1.jpg")
    (again,) = read("llava_med_instruct", path, images=tmp_path)
    assert again.image == tmp_path / "p1.jpg"


def test_alignment_may_have_the_placeholder_alone(tmp_path):
    write(tmp_path / "alignment" / "llava_med_alignment_500k.json", [dialogue("<image>", "A caption.")])
    (example,) = read_dataset("llava_med_align", tmp_path)
    assert (example.question, example.answer) == ("", "A caption.")


def test_llava_med_vqa_files_have_answer_types(tmp_path):
    write(tmp_path / "test.json", [dialogue("Is it?\n<image>", "yes", id=7, answer_type="CLOSED")])
    (example,) = read_dataset("llava_med_vqa", tmp_path, "test")
    assert (example.id, example.answer, example.answer_type) == ("7", "yes", "CLOSED")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (dialogue("a", "b", "<image> c", "d"), "message 3 has an <image>"),
        (dialogue("<image> a <image>", "b"), "more than once"),
        (dialogue("a <image> b", "c"), "amid the text"),
        (dialogue("a"), "ends with a question"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "a"}]}, "from 'gpt', but should be from 'human'"),
        ({"id": 1}, "'conversations' must be a list"),
        ({"id": 1, "conversations": [{"from": "human", "value": None}]}, "'value' is null"),
        (dialogue("a", "b", answer_type="MAYBE"), "must be OPEN or CLOSED"),
        (dialogue("a", "b", image="../../secret.jpg"), "leads out of the image folder"),
    ],
)
def test_errors_name_the_file_the_row_and_what_is_wrong(tmp_path, row, words):
    path = write(tmp_path / "train.json", [dialogue("a", "b"), row])
    with pytest.raises(DataError, match=words) as caught:
        read("llava_med_instruct", path, images=tmp_path)
    assert str(caught.value).startswith(f"{path} row 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows"),
        (b"[]", "no rows"),
        (b'[{"qid": 1},', "line 1: not JSON"),
        (b'{"a": 1}\n{"a": \n', "line 3: not JSON"),
        (b"[1]", "row 1: expected an object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"qid": 1}]', "row 1: no 'phrase_type' \\(the row has qid\\)"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "testset.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_dataset("vqa_rad", tmp_path, "test")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagenet", ".", "train"), "unknown data set 'imagenet'"),
        (("vqa_rad", ".", "validation"), "no split 'validation'"),
        (("slake", "nowhere", "train"), "does not exist"),
        (("slake", ".", "train"), "has no slake train file: expected train.json"),
    ],
)
def test_unknown_names_splits_and_folders_are_refused(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        read_dataset(*arguments)
    write(tmp_path / "trainset.json", [rad_row()])
    for options in ({"language": "zh"}, {"images": tmp_path / "nowhere"}):
        with pytest.raises(DataError):
            read_dataset("vqa_rad", tmp_path, **options)


def test_two_candidate_files_are_not_guessed_between(tmp_path):
    for size in ("10k", "60k"):
        write(tmp_path / f"llava_med_instruct_{size}.json", [dialogue("a", size)])
    with pytest.raises(DataError, match="several files"):
        read_dataset("llava_med_instruct", tmp_path)
    assert read_dataset("llava_med_instruct", tmp_path / "llava_med_instruct_10k.json")[0].answer == "10k"


def test_texts_are_never_cut_at_unusual_line_ends(tmp_path):
    row = {"id": 1, "image": "a.jpg", "question": "a\u2028b\x85c", "answer": "x\u2003y", "answer_type": "OPEN"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = read("pathvqa", path)
    assert (example.question, example.answer) == ("a\u2028b\x85c", "x\u2003y")


def test_arbitrary_text_survives_both_layouts(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(50):
        text = "".join(chr(c) for c in rng.integers(1, 0xD7FF, size=20)).strip() or "x"
        rows = [dialogue(text.replace("<image>", ""), text)]
        expected = read("llava_med_instruct", write(tmp_path / f"{number}.json", rows))
        assert read("llava_med_instruct", write(tmp_path / f"{number}.jsonl", rows, lines=True)) == expected
        assert expected[0].answer == text.strip()
