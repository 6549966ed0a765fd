"""`medv audit`: counted by hand on a small data set, and on the published files what others have counted on them."""

import json

import pandas as pd
import pytest
from paper_world import DATA
from PIL import Image
from typer.testing import CliRunner

from medv.cli import app
from medv.companion.audit.leakage import audit_dataset, beside_ceilings, blind_scores, overlap, with_counts
from medv.data.readers import read_dataset

ROWS = [
    ("train", "a.jpg", "Is there a mass?", "yes", "CLOSED"),
    ("train", "a.jpg", "What is shown?", "Chest", "OPEN"),
    ("train", "b.jpg", "Where is it?", "left lung", "OPEN"),
    ("test", "a.jpg", "What is  shown?", "chest", "OPEN"),
    ("test", "a.jpg", "Is there a mass?", "no", "CLOSED"),
    ("test", "c.jpg", "Which side?", "right lung", "OPEN"),
    ("test", "c.jpg", "CT or MRI?", "CT", "CLOSED"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        rows = []
        for number, (where, image, question, answer, kind) in enumerate(ROWS):
            if where == split:
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / image)
                row = {"qid": number, "image_name": image, "question": question, "answer": answer, "answer_type": kind}
                rows.append(row | {"phrase_type": "freeform", "question_type": "OTHER", "image_organ": "CHEST"})
        (tmp_path / f"{split}set.json").write_text(json.dumps(rows))
    return tmp_path


def test_what_the_splits_share_is_what_can_be_counted_by_hand(folder):
    train, test = (read_dataset("vqa_rad", folder, split) for split in ("train", "test"))
    found = overlap(train, test).set_index("measure")[["count", "of"]]
    assert found.to_numpy().tolist() == [[1, 2], [2, 4], [2, 4], [2, 4], [1, 2], [1, 2], [1, 2]]
    blind = blind_scores(train, test).set_index("answer")
    assert (blind.loc["reference", ["closed accuracy", "open recall", "open words", "open exact"]] == 100).all()
    assert blind.loc["nearest question", "open exact"] == 50 and blind.loc['"no"', "closed accuracy"] == 50


def test_a_count_stands_beside_each_percentage(folder):
    train, test = (read_dataset("vqa_rad", folder, split) for split in ("train", "test"))
    scores = blind_scores(train, test)
    assert set(scores["n closed"]) == {2} and set(scores["n open"]) == {2}
    cells = with_counts(scores).set_index("answer")
    assert (
        cells.loc["nearest question", "open exact"] == "50.0\n(1)" and cells.loc["reference", "closed, strict"] == "100.0\n(2)"
    )


def test_the_command_prints_every_table_at_80_columns_and_writes_json(folder):
    runner = CliRunner()
    shown = runner.invoke(app, ["audit", "vqa_rad", str(folder)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "…" not in shown.output and max(map(len, shown.output.splitlines())) <= 80
    assert "1 of 2" in shown.output and "nearest" in shown.output and "LLaDA-MedV" in shown.output
    found = json.loads(runner.invoke(app, ["audit", "vqa_rad", str(folder), "--json"]).stdout)
    assert set(found) == {"overlap", "blind", "printed"}
    again = json.loads(runner.invoke(app, ["audit", "vqa-rad", str(folder), "--json"]).stdout)
    assert again == found, "another spelling of the name is the same data set"
    refused = runner.invoke(app, ["audit", "knee_vqa", str(folder)])
    assert refused.exit_code == 2 and "knee_vqa" in refused.output


def test_the_ceiling_of_open_recall_is_what_the_official_metric_gives_the_best_training_answer(folder):
    for split, answers in (("train", ("yes", "lobe lobe and left", "x")), ("test", ("left upper lobe", "no", "the", "CT"))):
        rows = json.loads((folder / f"{split}set.json").read_text())
        rows = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
        (folder / f"{split}set.json").write_text(json.dumps(rows))
    train, test = (read_dataset("vqa_rad", folder, split) for split in ("train", "test"))
    found = beside_ceilings(pd.DataFrame([("x", 50.0, 37.0)], columns=["model", "closed", "open"]), [train], test)
    # A word said twice is counted twice: 3 of 4. "the" is no word, yet its question counts.
    assert found.filter(like="open above").columns[0].startswith("open above 0.8 / 2 = 37.5")


@pytest.mark.parametrize("kind", ["OPEN", "CLOSED"])
def test_a_test_split_of_one_type_of_question_is_printed_and_its_json_has_no_nan(folder, kind):
    rows = json.loads((folder / "testset.json").read_text())
    (folder / "testset.json").write_text(json.dumps([row for row in rows if row["answer_type"] == kind]))
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(app, ["audit", "vqa_rad", str(folder), *options])
        assert shown.exit_code == 0 and "nan" not in shown.stdout.lower() and "None" not in shown.stdout
    shares = [row["percent"] for row in json.loads(shown.stdout)["overlap"] if row["of"] == 0]
    assert shares and set(shares) == {None}, "of no questions there is no share, 0 % neither"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the published annotations are not here: set MEDV_DATA")
@pytest.mark.parametrize(
    ("name", "images", "nearest"),
    [("vqa_rad", [(202, 203), (203, 203)], 59.6), ("slake", [(0, 96)], None), ("pathvqa", [(0, 858)], None)],
)
def test_the_published_files_give_the_known_overlap_and_the_blind_score(name, images, nearest):
    found = audit_dataset(name, DATA / name)
    shared = found["overlap"][found["overlap"]["measure"] == "test images that are training images"]
    assert list(zip(shared["count"], shared["of"], strict=True)) == images
    if nearest:
        counts = found["overlap"].pivot(index="training", columns="measure", values="count").loc["1797 rows"]
        assert counts.filter(like="ceiling").tolist() == [72] and counts.filter(like="image and answer").tolist() == [2]
        blind = found["blind"].set_index(["training", "answer"])
        assert blind.loc[("1797 rows", "nearest question"), "closed, strict"] == pytest.approx(nearest, abs=0.05)
        assert blind.loc[("1797 rows", "nearest question"), "open words"] == pytest.approx(21.0, abs=0.05)
        assert blind.loc[("1797 rows", '"yes no"'), "closed accuracy"] == pytest.approx(92.28, abs=0.005)
        assert blind.loc[("1797 rows", '"no"'), "closed accuracy"] == pytest.approx(48.9, abs=0.05)
    assert isinstance(found["printed"], pd.DataFrame) and len(found["printed"]) > 3
    right = dict(zip(found["printed"]["model"], found["printed"].filter(like="right of").iloc[:, 0], strict=True))
    assert right["LLaDA-MedV"] == {"vqa_rad": "231", "slake": "384", "pathvqa": "no number"}[name]
    assert right["M2I2"] == {"vqa_rad": "227, rounded", "slake": "379, rounded", "pathvqa": "2984"}[name]
    zero_shot = {"vqa_rad": "204", "slake": "280"}.get(name)
    assert right.get("LLaDA-MedV, zero-shot") == zero_shot
