"""Many small trainings (notebooks 14, 30, 31): each trial leaves one file, so that a stopped run loses at most one trial."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers.utils import logging

from medv.artifacts import write_json


def run_trials(
    folder: Path, trials: Mapping[str, Any], work: Callable[[Any, Path], Mapping[str, Any]], *, quiet: bool = False
) -> dict[str, dict[str, Any]]:
    """The result of `work(trial, scratch)` for each trial (a dataclass) by name; results that `folder` holds are read.

    `scratch` is a folder for one trial, removed when its result is written to `folder`/<name>.json; an interrupted trial
    finds its own again. A result with other settings under the same name is replaced.
    """
    results = {}
    bar = tqdm(trials.items(), desc="trials", unit="trial", disable=quiet)
    for name, trial in bar:
        bar.set_postfix_str(name)
        path, scratch, settings = (folder / f"{name}.json", folder / f"{name}.work", json.loads(json.dumps(asdict(trial))))
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("settings") != settings:
            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()  # transformers draws one for each file that it reads or writes
            try:
                result = work(trial, scratch)
            finally:
                if shown:
                    logging.enable_progress_bar()
            write_json(path, {"settings": settings, "result": result})
            shutil.rmtree(scratch, ignore_errors=True)
            known = json.loads(path.read_text(encoding="utf-8"))
        results[name] = known["result"]
    return results


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame as JSON-able rows; NaN becomes null."""
    return json.loads(frame.to_json(orient="records"))
