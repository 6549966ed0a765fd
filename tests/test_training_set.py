"""What cannot be trained on is refused before anything is trained: test questions, and rows without their pictures."""

import json
from pathlib import Path

import pytest
import tiny
from published import DATA, needs_data

from medv.data.readers import DATASETS, DataError, read_dataset, read_training_set


def rad(number: int, phrase: str = "freeform", **fields) -> dict:
    row = {"qid": number, "image_name": "a.png", "question": f"Is it {number}?", "answer": "Yes", "answer_type": "CLOSED"}
    return {**row, "phrase_type": phrase, **fields}


def folder_of(place: Path, images: str = "images", **files: list[dict]) -> Path:
    (place / images).mkdir(parents=True)
    tiny.picture(0).save(place / images / "a.png")
    for name, rows in files.items():
        (place / f"{name}.json").write_text(json.dumps(rows))
    return place


# A picture for every row that names one.


def test_a_set_with_all_its_pictures_is_read(tmp_path):
    folder = folder_of(tmp_path, trainset=[rad(1), rad(2)], testset=[rad(3)])
    assert [example.id for example in read_training_set("vqa-rad", folder)] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("vqa_rad", "trainset.json", rad(1)),
        ("slake", "train.json", rad(1, img_name="a.png", q_lang="en")),
        ("pathvqa", "train.jsonl", rad(1, id=1, image="train/a.png")),
        ("llava_med_align", "x_align.json", {"id": 1, "image": "a.png"}),
        ("llava_med_instruct", "x_instruct.json", {"id": 1, "image": "a.png"}),
        ("llava_med_instruct", "y_instruct.json", {"id": 1, "pair_id": "a"}),
        ("llava_med_vqa", "train.json", {"id": 1, "image": "a.png"}),
    ],
)
def test_every_set_without_its_pictures_is_refused(tmp_path, name, file, row):
    spoken = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A lung."}]
    (tmp_path / file).write_text(json.dumps([row | {"conversations": spoken}]))
    (tmp_path / "pictures").mkdir()  # misnamed
    with pytest.raises(DataError, match="there is no folder images or imgs"):
        read_training_set(name, tmp_path, skip_corrupt=True)
    (tmp_path / "pictures").rename(tmp_path / "images")
    with pytest.raises(DataError, match=r"1 of the 1 images of .* are missing .*: look at the folder"):
        read_training_set(name, tmp_path, skip_corrupt=True)


def test_some_missing_pictures_are_counted_and_left_out_only_on_request(tmp_path):
    folder = folder_of(tmp_path, trainset=[rad(1), rad(2, image_name="b.png"), rad(3, image_name="c.png")])
    with pytest.raises(DataError, match=r"2 of the 3 images of .* are missing \(.*b\.png\): .*--skip-corrupt"):
        read_training_set("vqa_rad", folder)
    assert len(read_training_set("vqa_rad", folder, skip_corrupt=True)) == 3


def test_dialogues_without_an_image_of_their_own_need_none(tmp_path):
    spoken = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A lung."}]
    (tmp_path / "x_instruct.json").write_text(json.dumps([{"id": 1, "conversations": spoken}]))
    assert read_training_set("llava_med_instruct", tmp_path)[0].image is None


# No question of another split.


def test_the_one_file_of_vqa_rad_is_split_by_its_marks(tmp_path):
    rows = [rad(1), rad(2, "para"), rad(3, "test_freeform"), rad(4, "test_para"), rad(5, "frame")]
    folder = folder_of(tmp_path / "one", **{"VQA_RAD Dataset Public": rows})
    for place in (folder, folder / "VQA_RAD Dataset Public.json"):
        assert [example.id for example in read_training_set("vqa_rad", place)] == ["1", "2"]
        assert [example.id for example in read_dataset("vqa_rad", place, "test")] == ["3", "4"]
    named = folder_of(tmp_path / "two", trainset=rows)
    assert [example.id for example in read_training_set("vqa_rad", named)] == ["1", "2"]
    with pytest.raises(DataError, match="marks every row as test"):
        read_training_set("vqa_rad", folder_of(tmp_path / "three", trainset=rows[2:4]))


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("vqa_rad", "testset.json", rad(1)),
        ("slake", "test.json", rad(1, img_name="a.png", q_lang="en")),
        ("slake", "validate.json", rad(1, img_name="a.png", q_lang="en")),
        ("pathvqa", "test.jsonl", rad(1, id=1, image="a.png")),
        ("pathvqa", "pvqa_val.json", rad(1, id=1, image="a.png")),
    ],
)
def test_the_file_of_another_split_is_refused_by_its_name(tmp_path, name, file, row):
    (folder_of(tmp_path) / file).write_text(json.dumps([row]))
    with pytest.raises(DataError, match=rf"{file} is the (test|validation) file of {name}"):
        read_training_set(name, tmp_path / file)


@pytest.mark.parametrize(
    ("name", "files"), [("slake", ("train.json", "test.json")), ("pathvqa", ("train.jsonl", "test.jsonl"))]
)
def test_a_test_question_under_another_id_is_refused(tmp_path, name, files):
    folder = folder_of(tmp_path)
    for number, file in enumerate(files):
        row = rad(1, qid=number, id=number, image="a.png", img_name="a.png", q_lang="en", question="What is it?")
        (folder / file).write_text(json.dumps([row]))
    with pytest.raises(DataError, match="share 1 questions"):
        read_training_set(name, folder)


def test_questions_that_the_test_file_beside_asks_too_are_refused(tmp_path):
    folder = folder_of(tmp_path, trainset=[rad(1), rad(2)], testset=[rad(2), rad(3)])
    for place in (folder, folder / "trainset.json"):
        with pytest.raises(DataError, match=r"share 1 questions \(id 2\)"):
            read_training_set("vqa_rad", place)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("pathvqa", [rad(1, id=1, image="train/a.png"), rad(2, id=2, image="test/a.png")], "the test split .id 2"),
        ("pathvqa", [rad(1, id=1, image="val/a.png")], "the validation split"),
        ("slake", [rad(11934, img_name="xmlab1/source.jpg", q_lang="en")], "the test split .id 11934"),
        ("slake", [rad(9835, img_name="xmlab1/source.jpg", q_lang="en")], "the validation split"),
    ],
)
def test_rows_that_say_they_are_of_another_split_are_refused(tmp_path, name, rows, said):
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "train.jsonl").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=said):
        read_training_set(name, tmp_path)


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "alias"), [("vqa_rad", "testset.json", "trainset.json"), ("slake", "test.json", "train.json")]
)
def test_a_published_test_set_under_the_name_of_the_training_set_is_refused(tmp_path, name, file, alias):
    (tmp_path / alias).write_bytes((DATA / name / file).read_bytes())
    with pytest.raises(DataError, match=r"(test split|VQA-RAD's test set)"):
        read_training_set(name, tmp_path)


@pytest.mark.slow
@needs_data
def test_the_published_training_sets_hold_none_of_the_test_questions():
    assert len(read_training_set("vqa_rad", DATA / "vqa_rad")) == 1797
    for name in ("slake", "pathvqa"):  # no pictures there: all but these is in order
        with pytest.raises(DataError, match="there is no folder images"):
            read_training_set(name, DATA / name)


# What is closed, and in which language.


def test_grouped_answers_are_closed_as_the_official_normalization_sees_them(tmp_path):
    said = ["Yes", "no ", "NO.", "yes", "2", "not seen", "yes and no"]
    row = {"img_id": "test_0001", "sentf": {"pvqa": ["is it?"] * len(said)}}
    (tmp_path / "pvqa_test.json").write_text(json.dumps([row | {"labelf": {"pvqa": [{text: 1.0} for text in said]}}]))
    examples = DATASETS["pathvqa"].read(tmp_path / "pvqa_test.json")
    assert [example.answer_type for example in examples] == ["CLOSED"] * 4 + ["OPEN"] * 3


def test_the_language_is_known_in_any_case_and_a_file_without_it_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([rad(1, img_name="a.png", q_lang="EN")]))
    assert len(read_dataset("slake", tmp_path)) == 1
    with pytest.raises(DataError, match="no question in the language 'zh'"):
        read_dataset("slake", tmp_path, language="zh")
