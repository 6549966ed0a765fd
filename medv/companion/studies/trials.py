"""Many small trainings under one roof: each trial leaves one file, so that a stopped comparison loses at most one trial.

Notebooks 30 and 31 compare models over arms and seeds. What a trial does is said by the caller; this module runs those that
have no result yet, in order, under one progress bar.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers.utils import logging

from medv.artifacts import write_json
from medv.companion.studies.vqa_study import summarize
from medv.intervals import verdict


def run_trials(
    folder: Path, trials: Mapping[str, Any], work: Callable[[Any, Path], Mapping[str, Any]], *, quiet: bool = False
) -> dict[str, dict[str, Any]]:
    """What `work(trial, scratch)` returned for each trial (a dataclass) by name; what `folder` holds already is read.

    `scratch` is a folder for one trial, removed when its result is written to `folder`/<name>.json; a trial that was stopped
    finds its own again. The result of a trial with other settings under the same name is made anew.
    """
    results = {}
    bar = tqdm(trials.items(), desc="trials", unit="trial", disable=quiet)
    for name, trial in bar:
        bar.set_postfix_str(name)
        path, scratch, settings = (folder / f"{name}.json", folder / f"{name}.work", json.loads(json.dumps(asdict(trial))))
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("settings") != settings:
            with _one_bar():
                result = work(trial, scratch)
            write_json(path, {"settings": settings, "result": result})
            shutil.rmtree(scratch, ignore_errors=True)
            known = json.loads(path.read_text(encoding="utf-8"))
        results[name] = known["result"]
    return results


@contextmanager
def _one_bar() -> Iterator[None]:
    """Without the progress bars of transformers, one for each file that is read or written."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame as JSON-able rows; NaN becomes null."""
    return json.loads(frame.to_json(orient="records"))


def difference_rows(items: pd.DataFrame, better: str, base: str, metrics: list[str]) -> pd.DataFrame:
    """Rows of one condition minus those of another, paired by seed and id, as `studies.vqa_study.summarize` reads them.

    `items`: condition, seed, id and the metrics; pairs that one side lacks are left out.
    """
    sides = [items[items["condition"] == name].set_index(["seed", "id"])[metrics] for name in (better, base)]
    gap = (sides[0] - sides[1]).dropna(how="all")
    return gap.reset_index().assign(condition=f"{better} minus {base}")


def judged(differences: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """`summarize` of differences of one condition, with a verdict a metric; one that no pair has is "not measured"."""
    found = summarize(differences, metrics=metrics).reindex(columns=["metric", "value", "low", "high", "n", "seeds"])
    table = found.set_index("metric").reindex(metrics).rename_axis("metric").reset_index()
    table[["n", "seeds"]] = table[["n", "seeds"]].fillna(0).astype(int)
    return table.assign(verdict=[verdict(row.low, row.high) for row in table.itertuples()])
