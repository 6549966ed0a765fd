"""A user's loss over the band of notebook 15 (`medv compare-loss`): at which steps it lies outside, and what that means.

Another model, vocabulary or data set has another loss, so that only shapes are compared: by default every curve is divided by
its own mean over the first fifth of the steps. Both curves are read against the share of the run, because the learning rate
falls with it. Before the comparison the rows of the user's log are averaged over the windows of the band.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medv import artifacts
from medv.checkpoints.shards import read_object
from medv.companion.studies.loss_band import HIGH, LOW, NATS, SHAPE, START, in_scale, relative_noise
from medv.intervals import Estimate
from medv.reading import DataError, read_json
from medv.training.stages import FINISHED

UNIFORM = "uniform"
SCALES = {
    SHAPE: f"divided by its own mean over the first {START:.0%} of the steps",
    UNIFORM: "divided by ln V, the loss of a uniform guess among V tokens",
}
LEAST = 5  # rows of a log
ENDS = ("end", "end_low", "end_high")
NUMBERS = ["step", "median", "low", "high", *ENDS, "noise", "rate", "uniform", "steps", "batch_size", "seeds"]  # of a band


@dataclass(frozen=True)
class History:
    """A log of losses: `rows` with step and loss; `total` steps of the run; recipe: normalization and times, where known."""

    rows: pd.DataFrame
    total: int
    recipe: dict[str, str]


def read_history(path: Path, *, total: int | None = None) -> History:
    """Read medv's `history.json` or a Trainer's `trainer_state.json`; `total` is needed for a run that has not ended.

    Beside a `history.json` the recipe is read from `training.json`, if that is there. Raises DataError for a file that is no
    such log, for losses that are not finite, and for a log of fewer than LEAST rows.
    """
    found = read_json(path)
    entries = found.get("log_history") if isinstance(found, dict) else found
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} is no log of losses: give a history.json of medv or a trainer_state.json of the Trainer")
    rows = [entry for entry in entries if "loss" in entry]
    for number, entry in enumerate(rows, start=1):
        for name in ("step", "loss"):
            value = entry.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"{path}: the {name} of row {number} with a loss is {value!r}: it must be a finite number")
    frame = pd.DataFrame({name: [float(entry[name]) for entry in rows] for name in ("step", "loss")})
    if len(frame) < LEAST:
        raise DataError(f"{path} has {len(frame)} rows with a loss, fewer than {LEAST}: log more often (logging_steps)")
    if (back := frame["step"].diff() <= 0).any():
        later, before = frame["step"][back.idxmax()], frame["step"][back.idxmax() - 1]
        raise DataError(f"{path}: step {later:g} follows step {before:g}: give the log of one run, in order")
    if (frame["loss"] <= 0).all():
        raise DataError(f"{path}: no loss is above 0, so that there is no shape to compare")
    reached = [entry["step"] for entry in entries if isinstance(entry.get("step"), int | float)]  # validation stands there, too
    said = total or (found.get("max_steps") if isinstance(found, dict) else None) or max(reached)
    if not isinstance(said, int | float) or not frame["step"].iloc[-1] <= said < math.inf:
        raise DataError(
            f"{path} goes up to step {frame['step'].iloc[-1]:g}, beyond the {said!r} steps of the run: give --steps"
        )
    beside, recipe = path.with_name(FINISHED), {}
    if path.name == "history.json" and beside.is_file() and isinstance(known := read_object(beside).get("recipe"), dict):
        recipe = {name: known[name] for name in ("normalization", "times") if isinstance(known.get(name), str)}
    return History(frame, int(said), recipe)


def find_band(path: Path | None) -> Path:
    """The CSV of the band: `path`, or that of the tiny run here, or the one committed with the sources.

    Raises FileNotFoundError where there is none.
    """
    places = [artifacts.default_out("tiny") / "figures", artifacts.PACKAGE.parent / "figures" / "tiny"]
    known = [path] if path else [place / "loss_band.csv" for place in places]
    for file in known:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{known[0]} is not there: make the band with `medv reproduce --only loss_band`, or give its CSV with --band"
    )


def read_band(path: Path, normalization: str, times: str, scale: str) -> pd.DataFrame:
    """The rows of one band with `share`, the end of each window as a share of the run; raises DataError for another file."""
    try:
        table = pd.read_csv(path)
        part = table[(table["normalization"] == normalization) & (table["times"] == times)]
        part = part[part["scale"] == (SHAPE if scale == SHAPE else NATS)]
        kinds = {"trained": str} | dict.fromkeys([*NUMBERS, "left_out", "left_out_most"], float)
        part = part.astype(kinds).sort_values("step", ignore_index=True)
        if not np.isfinite(part[NUMBERS]).all(axis=None) or part["step"].duplicated().any() or (part["steps"] <= 0).any():
            raise ValueError("a number is missing, or a step stands there twice")
        share = part["step"] / part["steps"]
        unit = part["uniform"] if scale == UNIFORM else 1.0
        part = part.assign(**{name: part[name] / unit for name in ("median", "low", "high", *ENDS)}, share=share)
    except (KeyError, ValueError, TypeError) as error:  # pandas' ParserError is a ValueError
        raise DataError(f"{path} is no band of notebook 15 ({error}): give the loss_band.csv of a run") from None
    if part.empty:
        raise DataError(f"{path} has no band for normalization {normalization!r} and {times} t: give the CSV of a newer run")
    return part


def origin(path: Path) -> str:
    """What the band was made of, from the manifest beside the CSV."""
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        return "of unknown origin: there is no manifest beside the CSV"
    made = artifacts.Manifest.read(manifest)
    try:
        size = "{layers} layers of {hidden_size} features, {vocab_size} tokens in the vocabulary".format(
            **made.profile["model"]
        )
    except KeyError as error:
        raise DataError(f"{manifest} does not say the size of its model ({error}): give the band of a run") from None
    return f"profile {made.profile.get('name')} ({size}), data: {made.about.get('data', 'unknown').partition(',')[0]}"


def lay_over(history: History, band: pd.DataFrame, scale: str, *, vocabulary: int | None = None) -> pd.DataFrame:
    """The user's loss at each window of the band that has rows: first, last (steps), share, value, where.

    Raises ValueError where the scale cannot be computed.
    """
    rows = history.rows
    shares, losses = rows["step"].to_numpy() / history.total, rows["loss"].to_numpy()
    if scale == UNIFORM:
        if vocabulary is None:
            raise ValueError("the scale uniform needs the size of your vocabulary: give --vocab-size")
        scaled = losses / math.log(vocabulary)
    else:
        if not (early := shares <= START + 1e-9).any() or losses[early].mean() <= 0:
            raise ValueError(
                f"no loss above 0 is logged within the first {START:.0%} of the {history.total} steps, which set the scale: "
                "log more often, or use --scale uniform with --vocab-size"
            )
        scaled = in_scale(shares, losses, SHAPE)
    ends = band["share"].to_numpy()
    window = np.searchsorted(ends, shares - 1e-9)  # the window whose end is the first at or behind the row
    frame = pd.DataFrame({"step": rows["step"], "value": scaled, "window": window})
    found = (
        frame[frame["window"] < len(ends)]
        .groupby("window")
        .agg(first=("step", "min"), last=("step", "max"), value=("value", "mean"))
    )
    low, high = (band[name].to_numpy()[found.index] for name in ("low", "high"))
    where = np.select([found["value"] > high, found["value"] < low], ["above", "below"], "inside")
    return found.assign(share=ends[found.index], where=where).reset_index(drop=True)


def spans(own: pd.DataFrame, where: str) -> str:
    """The steps of the windows above or below, neighbors joined: "20 to 60, 140"; "none"."""
    said, place = [], own["where"] == where
    for _, part in own[place].groupby((place != place.shift()).cumsum()[place]):
        first, last = part["first"].iloc[0], part["last"].iloc[-1]
        said.append(f"{first:g}" if first == last else f"{first:g} to {last:g}")
    return ", ".join(said) or "none"


def report(history: History, band: pd.DataFrame, own: pd.DataFrame, made: str, scale: str) -> dict[str, Any]:
    """The comparison as facts, JSON-able; `sentences` says them."""
    row, counts = band.iloc[0], own["where"].value_counts()
    outside = 1 - counts.get("inside", 0) / len(own)
    steps, late = history.rows["step"], own[own["share"] > 1 - START + 1e-9]["value"]
    # One training has no others; and of a run that has not come to its end fewer windows are counted than of ours.
    known = scale == SHAPE and len(late) and not row[["left_out", "left_out_most"]].isna().any()
    return {
        "band": made,
        "normalization": row["normalization"],
        "times": row["times"],
        "scale": scale,
        "band_seeds": int(row["seeds"]),
        "band_steps": int(row["steps"]),
        "band_batch_size": int(row["batch_size"]),
        "band_rate": float(row["rate"]),
        "rows": len(history.rows),
        "steps": history.total,
        "steps_per_row": float(steps.diff().median()),
        "windows": len(own),
        "above": spans(own, "above"),
        "below": spans(own, "below"),
        "outside_share": outside,
        "last_fifth": float(late.mean()) if len(late) else None,
        **{f"band_{name}": float(row[name]) for name in ENDS},
        "healthy_outside_share": float(row["left_out"]) if known else None,
        "healthy_outside_most": float(row["left_out_most"]) if known else None,
        "noise_of_a_row": relative_noise(history.rows["loss"].to_numpy()),
        "band_noise_of_a_step": float(row["noise"]),
    }


def sentences(found: dict[str, Any], trained: str, *, batch_size: int | None = None) -> list[str]:
    """The facts of `report` as sentences. trained: the normalization that the band's trainings used."""
    seeds, window = found["band_seeds"], found["steps_per_row"]
    lines = [
        f"The band: {seeds} trainings of stage 2, {found['band_steps']} steps of {found['band_batch_size']} examples at "
        f"{found['band_rate']:g} of the recipe's learning rate, {found['band']}; normalization {found['normalization']} "
        f"(trained: {trained}), {found['times']} t; median and {LOW:.0%} to {HIGH:.0%} over seeds.",
        f"The scale: each loss is {SCALES[found['scale']]}. Compare the shape, not the size: another model, vocabulary or data "
        "set has another loss.",
        f"Your loss: {found['rows']} rows, one every {window:g} steps, of {found['steps']}; read by the share of the run.",
        f"Above the band at steps: {found['above']}.",
        f"Below the band at steps: {found['below']}.",
    ]
    outside = f"{found['outside_share']:.0%} of {found['windows']} windows lie outside"
    if found["healthy_outside_share"] is not None:
        usual, most = found["healthy_outside_share"], found["healthy_outside_most"]
        said = "no more than a healthy training of ours" if found["outside_share"] <= most else "more than any of ours"
        outside += f"; of a training of ours, over the band of the others, {usual:.0%} do, at most {most:.0%}: {said}"
    lines.append(f"{outside}.")
    if found["last_fifth"] is not None:
        ours = Estimate(found["band_end"], found["band_end_low"], found["band_end_high"]).cell(".2f")
        lines.append(
            f"Over the last fifth of the run your loss is {found['last_fifth']:.2f} in this scale, ours {ours}. Lower: yours "
            "fell further, as a longer training does; higher: it fell less."
        )
    noise = f"From row to row your loss scatters by {found['noise_of_a_row']:.0%} of its mean; a step of ours by "
    noise += f"{found['band_noise_of_a_step']:.0%}"
    if batch_size:
        share = math.sqrt(found["band_batch_size"] / (batch_size * window))
        noise += (
            f", which is {share * found['band_noise_of_a_step']:.0%} for rows of {batch_size * window:g} examples like yours"
        )
    lines.append(f"{noise}.")
    return lines
