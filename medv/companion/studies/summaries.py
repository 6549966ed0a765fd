"""Frames of answers in, frames of means out: summaries, paired differences and claims of the paper, for all studies."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from medv.intervals import NOT_MEASURED, RESAMPLES, Estimate, bootstrap, own_items, shared_items


def estimates(found: Mapping[tuple, Estimate], names: Sequence[str]) -> pd.DataFrame:
    """A row per estimate: its key in the columns `names`, then value, low, high, n and seeds."""
    rows = [dict(zip(names, key, strict=True)) | asdict(estimate) for key, estimate in found.items()]
    frame = pd.DataFrame(rows, columns=[*names, "value", "low", "high", "n", "seeds"])
    return frame.astype(dict.fromkeys(("value", "low", "high"), float))


def summarize(items: pd.DataFrame, metrics: Sequence[str], *, by: str = "condition") -> pd.DataFrame:
    """Means of items (`by`, seed, id, metrics), ids shared by all seeds: `by`, metric, value, low, high, n, seeds."""
    found = {}
    for name, part in items.groupby(by, sort=False):
        for metric in metrics:
            grid = part.pivot_table(index="seed", columns="id", values=metric, dropna=True)
            if not grid.empty:
                found[name, metric] = shared_items(grid.to_numpy())
    return estimates(found, (by, "metric"))


def summarize_scores(
    items: pd.DataFrame, by: Sequence[str] = ("system", "metric"), *, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Means of the column `score`: the columns `by`, value, low, high, n."""
    groups = items.groupby(list(by), sort=False)["score"]
    return estimates({key: bootstrap(scores, resamples=resamples) for key, scores in groups}, by).drop(columns="seeds")


def grid_of(values: pd.Series, seeds: pd.Series | pd.Index) -> np.ndarray:
    """Values as a grid [seeds, items]; every seed has the same number of items."""
    return np.stack([group.to_numpy(float) for _, group in values.groupby(seeds)])


def summarize_answers(items: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Means over seeds with items of their own: setting, metric, value, low, high, n (answers measured), seeds."""
    found = {
        (setting, metric): own_items(grid_of(part[metric], part["seed"]))
        for setting, part in items.groupby("setting", sort=False)
        for metric in metrics
    }
    return estimates(found, ("setting", "metric"))


def change(items: pd.DataFrame, metric: str, first: str, second: str) -> Estimate:
    """The metric of the second setting minus that of the first, paired by seed and request."""
    grid = items.pivot(index=["seed", "id"], columns="setting", values=metric)
    gap = grid[second] - grid[first]
    return own_items(grid_of(gap, gap.index.get_level_values("seed")))


def direction(found: Estimate) -> str:
    """ "rises", "falls", "no change shown" or "not measured"."""
    return found.verdict("rises", "falls", "no change shown")


def claimed(items: pd.DataFrame, claims: Iterable[tuple[str, str, str, str, str]]) -> Iterator[tuple]:
    """Each claim of `check_effects` about two settings that differ, and the `change` between them."""
    return ((*claim, change(items, *claim[1:4])) for claim in claims if claim[2] != claim[3])


def check_effects(items: pd.DataFrame, claims: Sequence[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    """The paper's effects beside ours. claims: (what the paper says, metric, first setting, second setting, direction).

    "appears here" is "yes", "no: " and the direction found, or "not measured".
    """
    rows = []
    for claim, metric, first, second, expected, found in claimed(items, claims):
        answers = {expected: "yes", NOT_MEASURED: NOT_MEASURED}
        answer = answers.get(direction(found), f"no: {direction(found)}")
        row = {"the paper says": claim, "metric": metric.replace("_", " "), "from": first, "to": second}
        rows.append(row | {"here": found.cell("+.1f"), "n": found.n, "appears here": answer})
    return pd.DataFrame(rows)


def differences(items: pd.DataFrame, name: str, base: str, metrics: list[str]) -> pd.DataFrame:
    """One condition minus another, paired by seed and id: metric, value, low, high, n, seeds, verdict."""
    sides = [items[items["condition"] == side].set_index(["seed", "id"])[metrics] for side in (name, base)]
    return with_verdicts((sides[0] - sides[1]).dropna(how="all").reset_index(), metrics)


def with_verdicts(gap: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """`summarize` of differences (seed, id, metrics) with a verdict per metric; one without a pair is "not measured"."""
    found = summarize(gap.assign(condition=""), metrics).set_index("metric").reindex(metrics).reset_index()
    found = found.fillna({"n": 0, "seeds": 0}).astype({"n": int, "seeds": int}).drop(columns="condition")
    return found.assign(verdict=[Estimate.of(row).verdict() for row in found.itertuples()])


def cells(summary: pd.DataFrame, metrics: Sequence[str], *, by: str = "setting", form: str = ".1f") -> pd.DataFrame:
    """A row per setting, a column "value [low, high]" per metric."""
    short = summary[summary["metric"].isin(metrics)]
    short = short.assign(cell=[Estimate.of(row).cell(form) for row in short.itertuples()])
    return short.pivot(index=by, columns="metric", values="cell").reindex(columns=list(metrics))


def means(summary: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A row per setting, a column of means per metric."""
    return summary[summary["metric"].isin(metrics)].pivot(index="setting", columns="metric", values="value")[list(metrics)]
