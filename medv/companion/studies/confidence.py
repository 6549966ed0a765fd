"""What confidence is worth (notebook 43): calibration of answers and of single tokens, before and after one fitted parameter.

The confidence of a token is its probability when it was written, that of an answer the product over its tokens up to the end.
Temperature scaling (arXiv 1706.04599) maps a confidence c to sigmoid(logit(c) / T); T is fitted on other questions than it is
judged on. ECE is the mean gap between confidence and accuracy over bins of equal width, AUROC the chance that a right answer is
more confident than a wrong one. Temperature scaling keeps the order, and so the AUROC.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from warnings import warn

import numpy as np
import pandas as pd

from medv.companion.studies.node import Node
from medv.companion.studies.training_stages import QuestionSet
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.evaluation.attribution import written
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import evaluate_vqa
from medv.intervals import LEVEL, Estimate
from medv.model.looks import Looks
from medv.phantoms.sets import vqa_set

NODE = Node(
    "confidence",
    "43_confidence.ipynb",
    "What the confidence of an answer is worth",
    needs=("models/stage3",),
    results=("confidence", "table_confidence", "warnings", "effects_confidence"),
    reads=("vqa_rad|slake|pathvqa",),
    heavy=True,
)

BINS, RESAMPLES = 10, 500
TEMPERATURES = np.geomspace(0.1, 100, 301)
FALSE_ALARMS = 0.1  # the share of right answers that a warning may touch
ANSWERS, TOKENS = "answers", "tokens"
FITTED_ON = {"test": "fit", "first half": "second half", "second half": "first half"}  # by the part that is judged


def steps_of(length: int) -> list[int]:
    """The numbers of forwards: L, L / 2, L / 4 and L / 8, at least 1."""
    return list(dict.fromkeys(max(length // share, 1) for share in (1, 2, 4, 8)))


def fitting_questions(one: QuestionSet) -> list[Example] | None:
    """Validation questions about phantoms; None for a real data set, all of whose other questions the model has learned."""
    size = one.profile.model.image_size
    return vqa_set("validation", one.profile.evaluation_questions, image_size=size) if one.source.name == "phantoms" else None


def observe(one: QuestionSet, folder: Path) -> pd.DataFrame:
    """Every trained seed asked the first test set, and the questions of `fitting_questions`, with each number of forwards.

    Columns: unit (ANSWERS or TOKENS), steps, seed, part ("test" or "fit"), id, kind, confidence (0 .. 1), right (bool). A
    token is right if the reference has it at this position; an answer if it is counted so: the closed answer agrees, or all
    words of an open one are said. Without questions of their own, those about each half of the test images serve to fit the
    other: part is "first half" or "second half".
    """
    name, test = next(iter(one.tests.items()))
    fit, frames = fitting_questions(one), []
    first = set(list(dict.fromkeys(map(_image, test)))[::2])
    halves = {"first half": [e for e in test if _image(e) in first], "second half": [e for e in test if _image(e) not in first]}
    parts = halves if fit is None else {"test": test, "fit": fit}
    looks = None
    models = {seed: folder / f"seed{seed}" for seed in one.profile.seeds if (folder / f"seed{seed}").is_dir()}
    for seed, model in (models or {one.profile.seeds[0]: folder}).items():
        answerer = Answerer.load(model, dtype=one.profile.dtype)
        if looks is None:  # the vision tower is frozen: every seed has the same
            looks = Looks(answerer.processor)
            if one.profile.stages["vqa"].cached_vision:
                looks.once(answerer.model.model, [example for examples in parts.values() for example in examples])
        for steps in steps_of(one.profile.answer.gen_length):
            spec = replace(one.profile.answer, steps=steps)
            config = replace(sampler_config(spec, seed=seed), block_length=spec.gen_length)
            for part, examples in parts.items():
                batches = answerer.traced(examples, config, batch_size=spec.batch_size, looks=looks)
                rows = _rows(answerer, examples, list(chain.from_iterable(batches)))
                frames.append(rows.assign(steps=steps, seed=seed, part=part, set=name))
    return pd.concat(frames, ignore_index=True)


def _image(example: Example) -> str:
    return example.meta.get("image", example.id)


def _rows(answerer: Answerer, examples: Sequence[Example], pairs: Sequence[tuple]) -> pd.DataFrame:
    """The answers and tokens of one set of questions."""
    items = evaluate_vqa([Reference.of(example) for example in examples], [answer.text for answer, _ in pairs]).items
    rows = []
    for example, item, (answer, trace) in zip(examples, items, pairs, strict=True):
        kind = example.meta.get("kind") or "any"
        end = answer.tokens + (answer.finish_reason == "stop")
        tokens = [event for event in written(trace) if event.position < end]
        right = item.hit if item.hit is not None else item.set_recall >= 1
        rows.append((ANSWERS, example.id, kind, float(np.prod([event.confidence for event in tokens])), bool(right)))
        truth = answerer.processor.tokenizer.encode(example.answer, add_special_tokens=False)
        for event in tokens:
            expected = truth[event.position] if event.position < len(truth) else None
            stops = event.position == len(truth) and event.token in answerer.model.config.stop_token_ids
            rows.append((TOKENS, example.id, kind, event.confidence, stops or event.token == expected))
    return pd.DataFrame(rows, columns=["unit", "id", "kind", "confidence", "right"])


# --- Calibration ---


def scaled(confidence: np.ndarray, temperature: float) -> np.ndarray:
    """sigmoid(logit(c) / T) of confidences c in 0 .. 1."""
    return 1 / (1 + np.exp(-logit(confidence) / temperature))


def logit(confidence: np.ndarray) -> np.ndarray:
    """log(c / (1 - c)); a confidence of 0 or 1, which float32 cannot tell from its neighbors, is moved inside by 1e-7."""
    inside = np.clip(np.asarray(confidence, float), 1e-7, 1 - 1e-7)
    return np.log(inside) - np.log1p(-inside)


def fit_temperature(confidence: np.ndarray, right: np.ndarray) -> float:
    """The T of TEMPERATURES with the smallest cross-entropy of `right` under the scaled confidence; a warning at their ends."""
    signed = np.where(np.asarray(right, bool), 1, -1) * logit(confidence)
    losses = [np.logaddexp(0, -signed / temperature).mean() for temperature in TEMPERATURES]
    best = int(np.argmin(losses))
    if best in (0, len(losses) - 1):
        warn(f"the fit to {len(right)} answers ends at {TEMPERATURES[best]:g}, an end of the search: take more", stacklevel=2)
    return float(TEMPERATURES[best])


def bins(
    confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence and accuracy (percent) and the sum of the weights (default 1) in each bin that is not empty."""
    confidence = np.asarray(confidence, float)
    weights = np.ones(len(confidence)) if weights is None else weights
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    n, *sums = (np.bincount(place, weights * values, BINS) for values in (1.0, confidence, np.asarray(right, float)))
    said, good = (100 * part[n > 0] / n[n > 0] for part in sums)
    return said, good, n[n > 0]


def reliability(confidence: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """The `bins` as a frame: confidence, accuracy, n."""
    return pd.DataFrame(dict(zip(("confidence", "accuracy", "n"), bins(confidence, right), strict=True)))


def ece(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Expected calibration error in percent: the gap of each of BINS bins of equal width, weighted by its share."""
    said, good, n = bins(confidence, right, weights)
    return float(np.average(np.abs(good - said), weights=n))


def auroc(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The chance in percent that a right item is more confident than a wrong one, ties half; NaN without both kinds."""
    right = np.asarray(right, bool)
    weights = np.ones(len(right)) if weights is None else weights
    _, place = np.unique(confidence, return_inverse=True)
    good, bad = (np.bincount(place, weights * side) for side in (right, ~right))
    pairs = good.sum() * bad.sum()
    return float(100 * (good * (bad.cumsum() - bad / 2)).sum() / pairs) if pairs else float("nan")


def calibrated_ece(confidence: np.ndarray, *, draws: int = 400) -> tuple[float, float]:
    """The ECE in percent that these confidences would have if they were right: mean and 97.5 % quantile of drawn answers.

    It is above 0, as the sample is finite.
    """
    rng = np.random.default_rng(0)
    drawn = [ece(confidence, rng.random(len(confidence)) < confidence) for _ in range(draws)]
    return float(np.mean(drawn)), float(np.quantile(drawn, 0.975))


def over_questions(part: pd.DataFrame, measure: Callable[[pd.DataFrame, np.ndarray | None], float]) -> Estimate:
    """A measure of rows and their weights with its 95 % interval: whole questions are drawn, with their rows of every seed."""
    place, questions = pd.factorize(part["id"])
    rng, n = np.random.default_rng(0), len(questions)
    drawn = [measure(part, rng.multinomial(n, np.full(n, 1 / n))[place]) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(measure(part, None), float(low), float(high), n, part["seed"].nunique())


def calibrate(observed: pd.DataFrame) -> pd.DataFrame:
    """The rows to report, with `fitted`, the scaled confidence, and `temperature`, for each unit and number of steps.

    T is fitted on "fit" for "test", or on each half for the other.
    """
    frames = []
    for _, group in observed.groupby(["unit", "steps"], sort=False):
        for part, rows in group[group["part"] != "fit"].groupby("part", sort=False):
            other = group[group["part"] == FITTED_ON[part]]
            temperature = fit_temperature(other["confidence"], other["right"])
            fitted = scaled(rows["confidence"], temperature)
            frames.append(rows.assign(fitted=fitted, temperature=temperature))
    return pd.concat(frames, ignore_index=True)


def calibration(calibrated: pd.DataFrame) -> pd.DataFrame:
    """A row per unit, steps and measure: accuracy, confidence, ECE, ECE after the fit, its change, and AUROC, in percent.

    Columns: unit, steps, metric, value, low, high, n (questions), seeds, temperature, calibrated and
    calibrated_high (`calibrated_ece`).
    """

    def error(rows: pd.DataFrame, weights: np.ndarray | None, column: str = "confidence") -> float:
        return ece(rows[column], rows["right"], weights)

    measures = {
        "accuracy": lambda rows, w: 100 * np.average(rows["right"], weights=w),
        "confidence": lambda rows, w: 100 * np.average(rows["confidence"], weights=w),
        "ECE": error,
        "ECE, fitted": lambda rows, w: error(rows, w, "fitted"),
        "ECE, fitted - half of ECE": lambda rows, w: error(rows, w, "fitted") - error(rows, w) / 2,
        "AUROC": lambda rows, w: auroc(rows["confidence"], rows["right"], w),
    }
    rows = []
    for (unit, steps), part in calibrated.groupby(["unit", "steps"], sort=False):
        natural, most = calibrated_ece(part["confidence"].to_numpy())
        about = {"temperature": part["temperature"].mean(), "calibrated": natural, "calibrated_high": most}
        for metric, measure in measures.items():
            found = asdict(over_questions(part, measure))
            rows.append({"unit": unit, "steps": steps, "metric": metric} | found | about)
    return pd.DataFrame(rows)


def calibration_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`calibration` to read: a row per unit and steps, "value [95 % interval]"."""
    rows = []
    for (unit, steps), part in summary.groupby(["unit", "steps"], sort=False):
        row = {"unit": unit, "Z": steps, "T": round(part["temperature"].iloc[0], 2)}
        row["ECE if calibrated (%)"] = round(part["calibrated"].iloc[0], 1)
        shown = part[part["metric"] != "ECE, fitted - half of ECE"]
        row |= {f"{line.metric} (%)": Estimate.of(line).cell() for line in shown.itertuples()}
        rows.append(row | {"questions": part["n"].iloc[0], "seeds": part["seeds"].iloc[0]})
    return pd.DataFrame(rows)


def calibration_verdicts(summary: pd.DataFrame) -> str:
    """For each unit and Z: is the ECE above that of calibrated confidences, and does the fit lower it to half or less?"""
    lines = []
    for (unit, steps), part in summary.groupby(["unit", "steps"], sort=False):
        by = part.set_index("metric")
        error, gap = Estimate.of(by.loc["ECE"]), Estimate.of(by.loc["ECE, fitted - half of ECE"])
        natural, most = by["calibrated"].iloc[0], by["calibrated_high"].iloc[0]
        off = "above" if error.value > most else "not shown to be above"
        said = gap.verdict("not to half", "to less than half", "to half is neither shown nor excluded")
        shown = f"{error.value:.1f} -> {by.loc['ECE, fitted', 'value']:.1f} %"
        level = f"{off} the {natural:.1f} % (at most {most:.1f}) of calibrated confidences"
        lines.append(f"{unit}, Z = {steps}: ECE {error.value:.1f} %, {level}; fitted {shown}: {said}")
    return "\n".join(lines)


def warnings(observed: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Which wrong answers a reader would be warned of, by kind of question, with `steps` forwards.

    A warning is shown below the confidence that FALSE_ALARMS of the right answers of the "fit" part (or of the other half)
    lie under. A row per kind: wrong and right answers, the share of each that carries the warning (percent).
    """
    answers = observed[(observed["unit"] == ANSWERS) & (observed["steps"] == steps)]
    frames = []
    for part, rows in answers[answers["part"] != "fit"].groupby("part", sort=False):
        other = answers[(answers["part"] == FITTED_ON[part]) & answers["right"]]
        limit = other["confidence"].quantile(FALSE_ALARMS)
        frames.append(rows.assign(warned=(rows["confidence"] < limit) if len(other) else np.nan))
    found, rows = pd.concat(frames), []
    for kind, part in [("all", found), *found.groupby("kind", sort=False)]:
        row = {"kind": kind}
        for name, side in (("wrong", part[~part["right"]]), ("right", part[part["right"]])):
            row |= {f"{name} answers": len(side), f"{name}, warned (%)": 100 * side["warned"].mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def curves(calibrated: pd.DataFrame) -> pd.DataFrame:
    """For the reliability diagram: unit, steps, fit ("as written" or "fitted"), confidence and accuracy of each bin, n."""
    frames = [
        reliability(part[column], part["right"]).assign(unit=unit, steps=steps, fit=fit)
        for (unit, steps), part in calibrated.groupby(["unit", "steps"], sort=False)
        for fit, column in (("as written", "confidence"), ("fitted", "fitted"))
    ]
    return pd.concat(frames, ignore_index=True)
