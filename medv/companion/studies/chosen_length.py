"""The length of an answer (notebook 22): a canvas of fixed size, the stop token, or a length chosen before the text is written.

Whether a model can say where its answer ends depends on what its training scored behind the answers. Two arms continue stage 2
with the same descriptions in the same order, one with end-of-text scored behind each answer, one without. Each is asked with
the canvas of the paper's way, with the stop token, and with `medv.model.length`. The threshold of the choice is taken on
validation descriptions. Where weights are given there are no arms, and the model of the run is asked as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medv.companion.studies.generation import ask_all, canvas_of, requests
from medv.companion.studies.node import Node
from medv.companion.studies.requests import Judge
from medv.companion.studies.summaries import change
from medv.companion.studies.trials import as_rows, run_trials
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import PhraseVeto
from medv.diffusion.length import ChosenLength
from medv.evaluation.answering import Answerer
from medv.evaluation.text import measure_answer
from medv.intervals import LEVEL, NOT_MEASURED, RESAMPLES, Estimate
from medv.phantoms.sets import description_set
from medv.phantoms.wording import description
from medv.profiles import Profile
from medv.training.examples import PHANTOMS, TrainingData
from medv.training.launch import RunOptions
from medv.training.stages import run_stage

NODE = Node(
    "chosen_length",
    "22_choosing_the_length.ipynb",
    "Choosing the length of an answer",
    needs=("models/stage2",),
    makes=("trials/chosen_length",),
    results=("chosen_length", "table_chosen_length", "effects_chosen_length"),
    reads=("qa50",),
    may_read=("judge",),
    heavy=True,
)

WITHOUT, WITH, ALONE = "without padding", "with padding", "the run's model"
FIXED, FULL, STOP, CHOSEN, VETO = "fixed canvas", "fixed canvas, Z = L", "stop token", "chosen length", "chosen length, veto"
THRESHOLDS = (0.1, 0.2, 0.4, 0.6)
BATCH, RATE = 4, 3e-4  # of the arms' short training: from a few runs on validation descriptions
MEDIAN_ERROR, REPEATED_SHARE, LOST = 15.0, 0.25, -2.0  # what is asked for: percent, a share of the fixed canvas's, points


@dataclass(frozen=True)
class LengthTrial:
    """One arm. padding: of the `examples` descriptions that it learns, BATCH a step; None asks the model as it is. canvas: L of
    the fixed canvas; longest: L where an answer may end. Z is canvas / 4, and for FULL canvas.
    """

    arm: str
    padding: str | None
    examples: int
    canvas: int
    longest: int


def trials_of(profile: Profile) -> dict[str, LengthTrial]:
    """The arms of a profile by name: a twelfth of the examples of stage 2; the longest canvas is 5 / 4 of the fixed one."""
    canvas = canvas_of(profile)[0]
    sizes = (max(BATCH, profile.stages["instruct"].samples // 12), canvas, canvas + canvas // 4)
    if profile.towers != "bundled":
        return {"model": LengthTrial(ALONE, None, 0, *sizes[1:])}
    return {"none": LengthTrial(WITHOUT, "none", *sizes), "padded": LengthTrial(WITH, f"fixed:{sizes[2]}", *sizes)}


def ways_of(trial: LengthTrial, threshold: float) -> dict[str, SamplerConfig]:
    """The samplers of an arm by name; all but FULL take canvas / 4 forwards, the choice's own included."""
    canvas, longest, steps = trial.canvas, trial.longest, max(2, trial.canvas // 4)
    chosen = {"length": ChosenLength(threshold)}
    return {
        FIXED: SamplerConfig(canvas, canvas, steps, min_length=canvas),
        FULL: SamplerConfig(canvas, canvas, canvas, min_length=canvas),
        STOP: SamplerConfig(longest, longest, steps),
        CHOSEN: SamplerConfig(longest, longest, steps - 1, **chosen),
        VETO: SamplerConfig(longest, longest, steps - 1, filters=(PhraseVeto(),), **chosen),
    }


def share_of(arm: str, way: str) -> float:
    """The share of the requests that a way answers: less of what is slow, and of what fails by far."""
    return {FIXED: 1 / 3, VETO: 0.0}.get(way, 1 / 6) if arm == WITHOUT else {FULL: 1 / 3, STOP: 1 / 6}.get(way, 1.0)


def threshold_for(answerer: Answerer, trial: LengthTrial, profile: Profile) -> float:
    """The one of THRESHOLDS with the smallest median error of the length, in tokens, on validation descriptions."""
    count = max(2, profile.evaluation_descriptions)
    examples = description_set("validation", count, image_size=profile.model.image_size)
    encode = answerer.processor.tokenizer.encode
    true = np.array([len(encode(example.answer, add_special_tokens=False)) for example in examples])
    errors = {}
    for threshold in THRESHOLDS:
        config = SamplerConfig(trial.longest, trial.longest, 1, length=ChosenLength(threshold))  # the text is thrown away
        found = np.array([answer.tokens for answer in answerer.answer(examples, config, quiet=True)])
        errors[threshold] = float(np.median(np.abs(found - true) / true))
    return min(errors, key=errors.get)


def trained(trial: LengthTrial, profile: Profile, init: Path, folder: Path) -> Answerer:
    """The arm's model: `init` as it is, or after the arm's part of stage 2."""
    if trial.padding is None:
        return Answerer.load(init, dtype=profile.dtype)
    sizes = {"samples": trial.examples, "epochs": 1, "batch_size": BATCH, "learning_rate": RATE}
    recipe = profile.with_recipe("instruct", padding=trial.padding, **sizes)
    examples = description_set("train", trial.examples, image_size=profile.model.image_size)
    options = RunOptions(checkpoints=False, quiet=True)
    run_stage("instruct", recipe, folder, options, init=init, examples=examples)
    return Answerer.load(folder, dtype=profile.dtype)


def compare_lengths(
    profile: Profile, init: Path, folder: Path, *, source: TrainingData = PHANTOMS, judge: Judge | None = None
) -> pd.DataFrame:
    """Every arm asked in every way: rows of `generation.ask_all` with arm, way, threshold, `reference` (words) and
    `length_error`, |words - reference| / reference in percent. Results in `folder` are kept.

    A way answers the first part of each set, `share_of`.
    """
    asked = requests(profile, source)
    words = {(seed, ex.id): len(ex.answer.split()) for seed, group in asked.items() for ex in group}

    def work(trial: LengthTrial, scratch: Path) -> Mapping[str, Any]:
        answerer = trained(trial, profile, init, scratch / "model")
        threshold = threshold_for(answerer, trial, profile) if trial.arm == WITH else ChosenLength().threshold
        frames = []
        for place, (way, config) in enumerate(ways_of(trial, threshold).items()):
            if not (share := share_of(trial.arm, way)):
                continue
            part = {seed: group[: max(2, round(share * len(group)))] for seed, group in asked.items()}
            how = {"batch_size": profile.describe.batch_size, "judge": judge}
            frames.append(ask_all({way: (answerer, config)}, part, scratch / "answers" / str(place), **how))
        items = pd.concat(frames, ignore_index=True).assign(threshold=threshold)
        return {"items": as_rows(items)}

    trials = trials_of(profile)
    found = run_trials(folder, trials, work).items()
    items = pd.concat([pd.DataFrame(kept["items"]).assign(arm=trials[name].arm) for name, kept in found], ignore_index=True)
    items = items.assign(way=items["setting"], setting=items["arm"] + ": " + items["setting"])
    items["score"] = items["score"].astype(float)
    items["reference"] = [words[row.seed, row.id] for row in items.itertuples()]
    return items.assign(length_error=100 * (items["words"] - items["reference"]).abs() / items["reference"])


# --- What is said of them ---


def resampled(values: np.ndarray, statistic: Callable[..., np.ndarray]) -> Estimate:
    """A statistic (of an axis) over the rows of values [n, ...] with its percentile bootstrap interval."""
    n = len(values)
    rows = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(statistic(values[rows], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(statistic(values, axis=0)), float(low), float(high), n)


def ratio(pairs: np.ndarray, axis: int) -> np.ndarray:
    """The mean of the first of each pair over the mean of the second, for pairs [..., n, 2] with n on this axis."""
    means = pairs.mean(axis=axis)
    return means[..., 0] / np.maximum(means[..., 1], 1e-9)


def apart(pairs: np.ndarray, axis: int) -> np.ndarray:
    """The median of the first of each pair minus that of the second, for pairs [..., n, 2] with n on this axis."""
    return -np.diff(np.median(pairs, axis=axis), axis=-1)[..., 0]


def measures(items: pd.DataFrame) -> pd.DataFrame:
    """A row per arm and way: forwards, and value, low and high of error (median, %), repeated (mean, %), score, words; n."""
    rows = []
    for (arm, way), part in items.groupby(["arm", "way"], sort=False):
        row = {"arm": arm, "way": way, "forwards": part["forwards"].mean(), "n": len(part)}
        row["neighbors"] = part["adjacent_duplicates"].mean()
        columns = {"error": ("length_error", np.median), "repeated": ("repeated_share", np.mean)}
        for name, (column, statistic) in (columns | {"score": ("score", np.mean), "words": ("words", np.mean)}).items():
            row[name] = resampled(part[column].to_numpy(float), statistic)
        rows.append(row)
    return pd.DataFrame(rows)


def length_table(found: pd.DataFrame, score: str) -> pd.DataFrame:
    """`measures` to read."""
    cell = {name: [one.cell() for one in found[name]] for name in ("error", "repeated", "score", "words")}
    table = found[["arm", "way"]].assign(forwards=found["forwards"].round(1))
    table["median |words - reference| (%)"], table["words"] = cell["error"], cell["words"]
    table["repeated words (%)"], table["equal neighbors (%)"] = cell["repeated"], found["neighbors"].round(1)
    return table.assign(**{score: cell["score"], "n": found["n"]})


def points_of(found: pd.DataFrame) -> pd.DataFrame:
    """`measures` in the columns of `medv.companion.figures.studies.length_figure`."""
    frame = found[["arm", "way", "forwards", "n"]].copy()
    for name in ("error", "repeated", "score"):
        frame[name] = [one.value for one in found[name]]
        frame[f"{name}_low"], frame[f"{name}_high"] = [one.low for one in found[name]], [one.high for one in found[name]]
    return frame


def levels(examples: Sequence[Example]) -> dict[str, float]:
    """For comparison, in percent: median length errors of the best constant length and, of phantoms, of a second description of
    the same scene; the repeated words of the references.
    """
    true = np.array([len(example.answer.split()) for example in examples])
    found = {"always the median length": 100 * float(np.median(np.abs(np.median(true) - true) / true))}
    if all("scene" in example.meta for example in examples):
        rng = np.random.default_rng(0)
        other = np.array([len(description(example.meta["scene"], rng).split()) for example in examples])
        found["another description of the same phantom"] = 100 * float(np.median(np.abs(other - true) / true))
    shares = [measure_answer({"text": example.answer})["repeated_share"] for example in examples]
    return found | {"repeated words of the references": float(np.mean(shares))}


def verdict(items: pd.DataFrame, known: Mapping[str, float]) -> str:
    """What was asked for, and what was found, of CHOSEN and VETO in the arm that can choose. known: `levels`."""
    arm = WITH if WITH in set(items["arm"]) else ALONE
    mine = items[items["arm"] == arm]
    lines = [] if arm == WITH else [f"the two arms of stage 2 are {NOT_MEASURED} with these weights: the model as it is"]
    for way in (CHOSEN, VETO):
        found = mine[mine["way"] == way]
        error = resampled(found["length_error"].to_numpy(float), np.median)
        said = "reached" if error.value <= MEDIAN_ERROR else "not reached"
        lines.append(f"{way}: median |words - reference| {error.cell()} %, n = {error.n}; at most {MEDIAN_ERROR:g} %: {said}")
        pairs = mine.pivot(index=["seed", "id"], columns="way", values="length_error")[[way, FIXED]].dropna().to_numpy()
        gap = resampled(pairs, apart)
        said = gap.verdict("larger", "smaller", "no difference is shown")
        lines.append(f"  that median minus the one of {FIXED}, points: {gap.cell('+.1f')}, n = {gap.n}: {said}")
        for base in (FIXED, FULL):
            grid = mine.pivot(index=["seed", "id"], columns="way", values="repeated_share")[[way, base]].dropna().to_numpy()
            share = resampled(grid, ratio)
            said = "reached" if share.value <= REPEATED_SHARE else "not reached"
            said = said if grid[:, 1].any() else "nothing to lower"
            of = f"{grid[:, 0].mean():.1f} of {grid[:, 1].mean():.1f} %, ratio {share.cell('.2f')}, n = {share.n}"
            lines.append(f"  repeated words against {base}: {of}; at most {REPEATED_SHARE:g}: {said}")
            gap = change(mine.assign(setting=mine["way"]), "score", base, way)
            said = NOT_MEASURED if np.isnan(gap.low) else "reached" if gap.low >= LOST else "not reached"
            lines.append(f"  score against {base}, points: {gap.cell('+.1f')}, n = {gap.n}; not below {LOST:g}: {said}")
    if (natural := known.get("repeated words of the references")) is not None:
        least = mine.groupby("way")["repeated_share"].mean().sub(natural).round(1)
        lines.append(
            "repeated words above those of the references, points: " + "; ".join(f"{w} {least[w]:+.1f}" for w in least.index)
        )
    told = "; ".join(f"{name} {value:.1f} %" for name, value in known.items())
    return "\n".join([*lines, f"for comparison: {told}"])


def padding_verdict(items: pd.DataFrame) -> str:
    """What padding does: length errors of the stop token and of the choice in both arms."""
    groups = items.groupby(["arm", "way"])["length_error"]
    errors = {key: f"{part.median():.0f} %" for key, part in groups}
    sizes = groups.size()
    lines = []
    for arm in dict.fromkeys(items["arm"]):
        stop, chosen = (f"{errors[arm, way]} (n = {sizes[arm, way]})" for way in (STOP, CHOSEN))
        lines.append(f"{arm}: median length error {stop} with the stop token, {chosen} with the choice")
    return "\n".join(lines)


def length_effects() -> list[tuple[str, str, str, str, str]]:
    """The choice against the fixed canvas at equal forwards, for `effects.claimed_effects` of `of_choosing_arm`."""
    metrics = ("repeated_share", "length_error", "score")
    return [(f"{way} minus {FIXED}", metric, FIXED, way, "") for way in (CHOSEN, VETO) for metric in metrics]


def of_choosing_arm(items: pd.DataFrame) -> pd.DataFrame:
    """The items of the arm that can choose, with the way as their setting."""
    mine = items[items["arm"] == (WITH if WITH in set(items["arm"]) else ALONE)]
    return mine.assign(setting=mine["way"])
