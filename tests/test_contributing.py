"""The examples of CONTRIBUTING.md run as they are printed."""

import json
import re
import sys
from dataclasses import replace

import pytest
import tiny

from medv import SamplerConfig
from medv.companion import studies
from medv.companion.audit.check import check_dataset
from medv.companion.reproduction import registry
from medv.data.readers import DATASETS, DataError, read_dataset, read_training_set
from medv.diffusion.filters import FILTERS
from medv.diffusion.schedules import SCHEDULES
from medv.evaluation.pairing import read_references


@pytest.fixture
def example(root, monkeypatch):
    """The namespace of the code under a heading of CONTRIBUTING.md, after it was executed."""
    for known, name in ((SCHEDULES, "left_to_right"), (FILTERS, "floor")):
        monkeypatch.setitem(known, name, None)  # restores the registries at the end

    def run(heading):
        text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
        section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        names = {"__name__": "contributing"}
        exec(compile("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), "CONTRIBUTING.md", "exec"), names)
        return names

    return run


def test_a_schedule_is_a_class_and_a_line_and_writes_from_left_to_right(example):
    names = example("A new schedule or filter")
    assert SCHEDULES["left_to_right"] == names["LeftToRight"]() and FILTERS["floor"] == names["ConfidenceFloor"]()
    network = tiny.model()
    inputs = tiny.processor()(text="What is shown?", return_tensors="pt")
    config = SamplerConfig(8, 8, 4, schedule=names["LeftToRight"](), stop_tokens=())
    events = network.generate(**inputs, config=config).trace.events
    assert [event.position for event in events] == list(range(8)) and max(event.step for event in events) == 3


def test_a_filter_defers_what_it_does_not_keep(example):
    names = example("A new schedule or filter")
    network, inputs = tiny.model(), tiny.processor()(text="What is shown?", return_tensors="pt")
    plain = SamplerConfig(8, 8, 2, stop_tokens=())
    strict = replace(plain, filters=(names["ConfidenceFloor"](1.0),))
    events = [network.generate(**inputs, config=config).trace.events for config in (plain, strict)]
    assert [sum(event.step == 0 for event in of_run) for of_run in events] == [4, 1]


def test_a_study_file_declares_its_notebook_and_makes_its_table(root, tmp_path, monkeypatch):
    section = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A new figure\n", 1)[1].split("\n## ", 1)[0]
    study, notebook = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "reference_words.py").write_text(study, encoding="utf-8")
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "all_nodes", registry.all_nodes.__wrapped__)  # without its cache
    monkeypatch.delitem(sys.modules, "medv.companion.studies.reference_words", raising=False)
    assert registry.ordered(registry.all_nodes(), ["reference_words"])[0].notebook == "60_reference_words.ipynb"
    exec(compile(notebook, "CONTRIBUTING.md", "exec"), {"profile": "smoke", "seed": 0, "out": str(tmp_path / "run")})
    sys.modules.pop("medv.companion.studies.reference_words")
    saved = tmp_path / "run" / "figures" / "reference_words.csv"
    assert saved.read_text(encoding="utf-8").startswith("system,words\n") and saved.with_suffix(".png").stat().st_size > 0


def test_a_data_set_is_one_record(example, monkeypatch, tmp_path):
    monkeypatch.setattr("medv.data.readers.DATASETS", records := dict(DATASETS))
    monkeypatch.setattr("medv.evaluation.pairing.DATASETS", records)
    example("A new data set")
    row = {"number": 1, "picture": "a.png", "joint": "left", "question": "Is it torn?", "answer": "no", "answer_type": "CLOSED"}
    rows = [row, {**row, "number": 2, "question": "What is torn?", "answer": "the meniscus", "answer_type": "OPEN"}]
    (tmp_path / "images").mkdir()
    tiny.picture(0).save(tmp_path / "images/a.png")
    (tmp_path / "knee_train.json").write_text(json.dumps(rows))
    first, second = read_dataset("knee-vqa", tmp_path)
    assert (first.id, first.answer_type, first.meta["joint"]) == ("1", "CLOSED", "left")
    assert (second.image, second.answer) == (tmp_path / "images/a.png", "the meniscus")
    assert read_training_set("knee_vqa", tmp_path) == [first, second]
    counts = {count.quantity: count.counted for count in check_dataset("knee_vqa", tmp_path).counts}
    assert counts == {"images": 1, "qa_pairs": 2, "closed_form": 1, "open_form": 1}
    assert [reference.answer for reference in read_references(tmp_path / "knee_train.json")] == ["no", "the meniscus"]
    (tmp_path / "knee_test.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(DataError, match="share 1 questions"):
        read_training_set("knee_vqa", tmp_path)
