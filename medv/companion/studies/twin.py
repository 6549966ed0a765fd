"""The autoregressive twin (notebook 13): how it was trained, and whether a run has one."""

import json
from pathlib import Path

import pandas as pd

from medv.companion.studies.node import Node

NODE = Node(
    "twin", "13_autoregressive_twin.ipynb", "The autoregressive twin", makes=("models/twin",), results=("twin",), heavy=True
)


def twin_facts(folder: Path) -> dict:
    """The contents of the folder's twin.json; a model trained elsewhere has none."""
    if not (folder / "twin.json").is_file():
        return {"given": "trained elsewhere"}
    return json.loads((folder / "twin.json").read_text(encoding="utf-8"))


def twin_table(folder: Path) -> pd.DataFrame:
    """The training of the twin, a row per stage: steps, trainable parameters, last losses; or why there is no twin."""
    facts = twin_facts(folder)
    stages = [{"stage": name, **row} for name, row in facts.items() if isinstance(row, dict)]
    note = pd.DataFrame([{"twin": text} for name, text in facts.items() if name in ("none", "copied from", "given")])
    return pd.DataFrame(stages) if stages else note


def twin_in(folder: Path) -> Path | None:
    """The folder, or None if its twin.json says that this profile has no twin."""
    return None if "none" in twin_facts(folder) else folder
