"""The effects that a notebook reports, one table each (`effects_<node>`): what `medv replicate` compares between runs.

An effect is a difference with its 95 % interval; its name and unit stay the same from run to run.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from medv.companion.studies.summaries import claimed, differences, estimates
from medv.intervals import Estimate, bootstrap

UNITS = {"words": "words", "seconds": "seconds", "longest_run": "words", "cross_entropy": "nats"}
"""Units by metric; all other metrics are percentages, whose differences are points."""
COLUMNS = ["effect", "value", "low", "high", "unit", "n", "seeds", "verdict"]


def effect_table(found: Mapping[str, Estimate], unit: str = "points") -> pd.DataFrame:
    """A row per effect, in COLUMNS; the verdict is that of the interval."""
    rows = estimates({(name,): gap for name, gap in found.items()}, ["effect"])
    return rows.assign(unit=unit, verdict=[gap.verdict() for gap in found.values()])[COLUMNS]


def named_effects(rows: pd.DataFrame, form: str) -> pd.DataFrame:
    """The effects in a frame with value, low, high, n and seeds. form: the name of each, with columns in braces."""
    names = [form.format(**row).replace("_", " ") for row in rows.to_dict("records")]
    units = rows["metric"].map(UNITS).fillna("points") if "metric" in rows else "points"
    verdicts = [Estimate.of(row).verdict() for row in rows.itertuples()]
    return rows.assign(effect=names, unit=units, verdict=verdicts)[COLUMNS].reset_index(drop=True)


def claimed_effects(items: pd.DataFrame, claims: Sequence[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    """The differences that `summaries.check_effects` judges."""
    tables = [
        effect_table({f"{claim}: {metric.replace('_', ' ')}": gap}, UNITS.get(metric, "points"))
        for claim, metric, *_, gap in claimed(items, claims)
    ]
    return pd.concat(tables, ignore_index=True)


def text_effects(judged: pd.DataFrame, name: str, bases: Sequence[str]) -> pd.DataFrame:
    """F1 of one system's texts minus that of others, on the requests both answered (`training_stages.judge_texts`)."""
    grid = judged[judged["metric"] == "f1"].pivot(index="id", columns="system", values="score")
    return effect_table({f"{name} minus {base}: F1": bootstrap(grid[name] - grid[base]) for base in bases})


def margin_effects(items: pd.DataFrame, name: str, bases: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """One condition minus each of the others in each test set, paired by seed and question (`training_stages.study_sets`)."""
    frames = []
    for test, part in items.groupby("test", sort=False):
        for base in (base for base in bases if base in set(part["condition"])):
            found = differences(part, name, base, list(metrics))
            frames.append(named_effects(found, f"{test}, {name} minus {base}: {{metric}}"))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
