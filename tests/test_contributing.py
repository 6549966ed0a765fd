"""The examples of CONTRIBUTING.md run as they are printed."""

import re
import sys
from dataclasses import replace

import pytest
import tiny

from medv import SamplerConfig
from medv.companion import studies
from medv.companion.reproduction import registry
from medv.diffusion.schedules import SCHEDULES


@pytest.fixture
def example(root):
    """The namespace of the code under a heading of CONTRIBUTING.md, after it was executed."""

    def run(heading):
        text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
        section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        names = {"__name__": "contributing"}
        exec(compile("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), "CONTRIBUTING.md", "exec"), names)
        return names

    return run


def test_a_schedule_is_a_class_and_a_line_and_writes_from_left_to_right(example, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "left_to_right", None)  # restores the registry at the end
    names = example("A new schedule or filter")
    assert SCHEDULES["left_to_right"] == names["LeftToRight"]()
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
