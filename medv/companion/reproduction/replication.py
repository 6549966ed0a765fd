"""Runs with different seeds of the whole pipeline side by side: which reported effects come again (`medv replicate`).

Every notebook writes its effects as `effects_<node>.csv`, with intervals over images and seeds of the last training. They
leave out what the first stages draw; here a pipeline seed, all stages included, is the outer level. An effect is shown if its
interval lies on the same side of zero in every run, in at least three, and the mean over runs differs from zero after Holm's
correction for the number of effects. Everything else is open.
"""

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from medv.artifacts import PACKAGE, Manifest, atomic_directory, write_text
from medv.companion.figures import plots
from medv.companion.figures.studies import effects_figure
from medv.companion.reproduction.cache import SUFFIXES
from medv.companion.studies.effects import COLUMNS
from medv.intervals import LEVEL, NOT_MEASURED, Estimate
from medv.reading import DataError, read_text, visible

LEAST_RUNS = 3
"""An effect is shown in so many runs or not at all."""
PREFIX, NAME = "effects_", "replication"


def effects_of(run: str | Path) -> tuple[pd.DataFrame, Manifest]:
    """The effects of a run (its folder, or a folder of results) by notebook and effect, and the manifest of one of them.

    Raises DataError where there are none, or where they were made with several seeds or profiles.
    """
    folder = _figures(run)
    files = sorted(folder.glob(f"{PREFIX}*.csv"))
    if not files:
        raise DataError(f"{folder} holds no {PREFIX}*.csv: give the folder of a finished run of `medv reproduce`")
    frames, manifests = zip(*map(_read_effects, files), strict=True)
    made = {(manifest.seed, manifest.profile["name"]) for manifest in manifests}
    if len(made) > 1:
        raise DataError(f"the results in {folder} were made with several seeds or profiles, {sorted(made)}: finish the run")
    rows = pd.concat(frames).sort_index(level="notebook", kind="stable", sort_remaining=False)
    if (twice := rows.index[rows.index.duplicated()]).size:
        raise DataError(f"{folder} reports the effect {twice[0][1]!r} of {twice[0][0]} twice: finish the run")
    return rows, manifests[0]


def _figures(run: str | Path) -> Path:
    return Path(run) / "figures" if (Path(run) / "figures").is_dir() else Path(run)


def _read_effects(file: Path) -> tuple[pd.DataFrame, Manifest]:
    """The effects in a file by notebook and effect, and its manifest; raises DataError for anything else."""
    manifest = Manifest.read(file.with_suffix(".json"))
    notebook, profile = manifest.about.get("notebook"), manifest.profile.get("name")
    if manifest.seed is None or not isinstance(notebook, str) or not isinstance(profile, str):
        raise DataError(f"{file.with_suffix('.json')} names no notebook, profile or seed: give the folder of a run")
    try:
        rows = pd.read_csv(io.StringIO(read_text(file)), dtype={"effect": str, "unit": str})[COLUMNS[:6]]
        rows = rows.astype(dict.fromkeys(("value", "low", "high", "n"), float))
        whole = rows[["effect", "unit", "n"]].notna().all(axis=None) and not np.isinf(rows.select_dtypes(float)).any(axis=None)
    except (KeyError, ValueError) as error:  # pandas' ParserError is a ValueError
        raise DataError(f"{file} is no table of effects ({error}): give the folder of a run") from None
    if not whole:
        raise DataError(f"{file} has an effect without name, unit or n, or an infinite one: give the folder of a run")
    return rows.assign(notebook=notebook.removesuffix(".ipynb")).set_index(["notebook", "effect"]), manifest


def pooled(parts: Sequence[Estimate]) -> tuple[Estimate, float]:
    """The mean of one effect over runs with its 95 % interval, and the p-value of zero (two-sided).

    All runs answer the same test items, so the error of the items does not fall with the number of runs: the squared standard
    error is the variance between runs over their number, plus the mean squared error within a run. Student's t with the
    degrees of freedom of Welch and Satterthwaite.
    """
    values = np.array([part.value for part in parts])
    within = np.mean([((part.high - part.low) / (2 * 1.96)) ** 2 for part in parts])
    between = values.var(ddof=1) / len(values)
    value, error = values.mean(), np.sqrt(between + within)
    if np.isnan(error):
        return Estimate(value, np.nan, np.nan, seeds=len(values)), np.nan
    if error == 0:  # the same number in every run and every resample
        return Estimate(value, value, value, max(part.n for part in parts), len(values)), float(value == 0)
    freedom = (between + within) ** 2 * (len(values) - 1) / between**2 if between else np.inf
    sizes, beyond = student(freedom)
    half = np.interp(LEVEL - 1, -beyond, sizes) * error
    p = float(np.interp(abs(value) / error, sizes, beyond))
    return Estimate(value, value - half, value + half, max(part.n for part in parts), len(values)), p


def student(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes t from 0 on, and the two-sided probability that Student's t with so many degrees of freedom is larger.

    With t = sqrt(freedom) tan(a) the density is proportional to cos(a) ** (freedom - 1). From 1e6 on it is the normal law's.
    """
    freedom = min(freedom, 1e6)
    angles = np.arctan(np.concatenate([np.linspace(0, 40, 40_001), np.geomspace(40.01, 1e6, 4_000)]) / np.sqrt(freedom))
    density = np.exp((freedom - 1) * np.log(np.cos(angles)))
    steps = np.diff(angles) * (density[1:] + density[:-1]) / 2
    above = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
    return np.sqrt(freedom) * np.tan(angles), above / above[0]


def holm(values: Sequence[float]) -> np.ndarray:
    """P-values corrected for their number by Holm's method; NaN stays and does not count."""
    found = np.asarray(values, float)
    corrected, known = np.full(len(found), np.nan), np.flatnonzero(~np.isnan(found))
    order = known[np.argsort(found[known], kind="stable")]
    steps = found[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def replicate(runs: Sequence[str | Path]) -> tuple[pd.DataFrame, list[Manifest]]:
    """A row per effect that two runs or more report: notebook, effect, unit, value, low, high (over runs), p (corrected),
    a column "seed <k>" with each run's "value [low, high]", again ("2 of 3"), status; and a manifest of each run.

    Raises DataError for fewer than two runs, equal seeds, several profiles, or runs without an effect in common.
    """
    found, manifests = zip(*map(effects_of, runs), strict=True) if runs else ((), ())
    seeds = [manifest.seed for manifest in manifests]
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise DataError(f"seeds of the runs: {seeds}. Give two runs or more, each of its own seed (`medv reproduce --seed 1`)")
    if len(names := {manifest.profile["name"] for manifest in manifests}) > 1:
        raise DataError(f"the runs have several profiles, {', '.join(sorted(names))}: compare runs of one profile")
    keys = pd.concat(found).index
    keys = keys[keys.duplicated()].drop_duplicates()
    if not len(keys):
        raise DataError("no effect is reported by two runs: finish them with `medv reproduce`")
    rows = [
        _compared(key, {k: frame.loc[key] for k, frame in zip(seeds, found, strict=True) if key in frame.index}) for key in keys
    ]
    table = pd.DataFrame(rows)
    table["p"] = holm(table["p"])
    table["status"] = [_status(row, len(seeds)) for row in table.to_dict("records")]
    return table[[*table.columns.drop(["agree", "again", "status"]), "again", "status"]], list(manifests)


def _compared(key: tuple[str, str], parts: Mapping[int, pd.Series]) -> dict:
    """One effect in the runs that report it, by seed; `agree` counts the runs whose interval lies on the side of the mean."""
    each = {seed: Estimate(part["value"], part["low"], part["high"], int(part["n"])) for seed, part in parts.items()}
    mean, p = pooled([*each.values()])
    side, (unit, *others) = "higher" if mean.value > 0 else "lower", {part["unit"]: None for part in parts.values()}
    if others:
        raise DataError(f"{key[1]!r} of {key[0]} is in {unit} and in {others[0]}: compare runs of one version of medv")
    agree = sum(part.verdict() == side for part in each.values())
    row = {"notebook": key[0], "effect": key[1], "unit": unit, "value": mean.value, "low": mean.low, "high": mean.high, "p": p}
    row |= {f"seed {seed}": part.cell("+.3f" if unit in ("nats", "seconds") else "+.1f") for seed, part in each.items()}
    return row | {"again": f"{agree} of {len(each)}", "agree": agree}


def _status(row: dict, runs: int) -> str:
    if np.isnan(row["p"]):
        return NOT_MEASURED
    if row["agree"] == runs >= LEAST_RUNS and row["p"] < 1 - LEVEL:
        return "shown: " + ("higher" if row["value"] > 0 else "lower")
    return "open"


def write_replication(runs: Sequence[str | Path], out: str | Path) -> tuple[pd.DataFrame, Path]:
    """Write `replication` as table, figure and manifest into the folder `out`, and each run's effects, with their manifests,
    into `replication/seed<k>` there, from which the same command makes the same table. Returns the table and its CSV.

    Raises ValueError, with nothing written, where other files than such effects of these very seeds are in `replication`, and
    where files of the names of the results are there that this did not write.
    """
    table, manifests = replicate(runs)
    out = Path(out)
    there = [file for suffix in SUFFIXES if (file := out / f"{NAME}{suffix}").exists()]
    if there and not ((made := out / f"{NAME}.json").is_file() and Manifest.read(made).name == NAME):
        raise ValueError(f"{there[0]} is not of `medv replicate`: choose another --out, or move it away")
    seeds = {f"seed{manifest.seed}" for manifest in manifests}
    for file in (file for file in (out / NAME).rglob("*") if not file.is_dir()):
        if file.parent.parent != out / NAME or file.parent.name not in seeds or not file.name.startswith(PREFIX):
            raise ValueError(f"{file} is none of the effects of these runs: choose another --out, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    for run, manifest in zip(runs, manifests, strict=True):
        source = _figures(run)
        with atomic_directory(out / NAME / f"seed{manifest.seed}") as kept:
            for file in sorted((*source.glob(f"{PREFIX}*.csv"), *source.glob(f"{PREFIX}*.json"))):
                shutil.copyfile(file, kept / file.name)
    about = {"caption": f"Effects in {len(runs)} runs, each with a seed of its own for all stages"}
    about |= {"runs": [{"seed": m.seed, "commit": m.commit, "code": m.code, "platform": m.platform} for m in manifests]}
    shown = int(table["status"].str.startswith("shown").sum())
    fig = effects_figure(table, f"{shown} of {len(table)} effects are shown in {len(runs)} pipeline seeds")
    plots.footer(fig, "; ".join({str(m.about.get("data", f"profile {m.profile['name']}")): None for m in manifests}))
    Manifest(NAME, manifests[0].profile, about=about).write(out / f"{NAME}.json")  # first: by it the others are known as ours
    plots.save(fig, out / NAME)
    return table, write_text(out / f"{NAME}.csv", table.to_csv(index=False))


def published(profile: str) -> pd.DataFrame:
    """The committed comparison of a profile: notebook, effect, unit, mean over runs, again, status; empty without one."""
    file = PACKAGE.parent / "figures" / profile / f"{NAME}.csv"
    if not file.is_file():
        return pd.DataFrame(columns=["notebook", "effect", "unit", "mean over runs", "again", "status"])
    table = pd.read_csv(file)
    table["mean over runs"] = [Estimate.of(row).cell("+.2f") for row in table.itertuples()]
    return table[["notebook", "effect", "unit", "mean over runs", "again", "status"]]


def listing(table: pd.DataFrame) -> Group:
    """The table by notebook for a terminal of 80 columns, and how many effects are shown."""
    parts = []
    for notebook, rows in table.groupby("notebook", sort=False):
        grid = Table(title=notebook, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for column, side in (("effect", "left"), ("mean over runs", "right"), ("again", "left"), ("status", "left")):
            grid.add_column(column, justify=side, min_width=6)
        for row in rows.itertuples():
            mean = Estimate(row.value, row.low, row.high).cell("+.2f" if row.unit == "nats" else "+.1f")
            said = Text(row.status, style="green" if row.status.startswith("shown") else "yellow")
            unit = "" if row.unit == "points" else f" ({row.unit})"
            grid.add_row(Text(visible(row.effect + unit)), mean, row.again, said)
        parts += [grid, ""]
    shown = int(table["status"].str.startswith("shown").sum())
    last = f"{shown} of {len(table)} effects are shown; an effect is shown in {LEAST_RUNS} runs or more, all of them."
    return Group(*parts, last)
