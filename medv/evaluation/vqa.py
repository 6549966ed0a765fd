"""Closed accuracy and open recall of visual question answering (Tables 2 and 4), as the official evaluation computes them.

"Official" is LLaVA-Med v1.0.0, whose evaluation the paper uses; its two variants differ on closed questions. `batch` (the
default, and the one that can produce the paper's numbers) counts an answer as right when the normalized reference occurs
anywhere in the normalized prediction; `gated` also requires a "yes" or "no" somewhere in the prediction. Both reward verbose
answers: "yes no" is right for every yes/no question. Strict accuracy, recall over distinct words, and the share of answers
that say both yes and no are therefore reported beside them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import numpy as np

from medv.evaluation.normalize import normalize
from medv.evaluation.pairing import Reference

VARIANTS = ("batch", "gated")
METRICS = {
    "closed_accuracy": "hit",
    "closed_strict_accuracy": "strict_hit",
    "yes_and_no_share": "yes_and_no",
    "open_recall": "recall",
    "open_precision": "precision",
    "open_f1": "f1",
    "open_set_recall": "set_recall",
}
"""Metric -> the field of `ItemScore` that it averages."""
_YES_NO = re.compile(r"\b(yes|no)\b")


@dataclass(frozen=True)
class ItemScore:
    """The scores of one question, each in [0, 1]; those of the other answer type are None."""

    id: str | None
    answer_type: str
    hit: float | None = None
    strict_hit: float | None = None
    yes_and_no: float | None = None
    recall: float | None = None
    precision: float | None = None
    f1: float | None = None
    set_recall: float | None = None


@dataclass(frozen=True)
class VQAScores:
    """The scores of a set of questions in percent (None where it has no question of that type) and the items they average."""

    closed_accuracy: float | None
    open_recall: float | None
    open_precision: float | None
    open_f1: float | None
    closed_strict_accuracy: float | None
    open_set_recall: float | None
    yes_and_no_share: float | None
    n_closed: int
    n_open: int
    variant: str
    items: tuple[ItemScore, ...] = field(repr=False)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The scores without the items, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "items"}

    def values(self, metric: str) -> np.ndarray:
        """The per-question values behind one metric, in percent and in order, e.g. `values("open_recall")`: [n_open]."""
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
        found = (getattr(item, METRICS[metric]) for item in self.items)
        return np.array([100.0 * value for value in found if value is not None])


def evaluate_vqa(references: Sequence[Reference], predictions: Sequence[str], *, variant: str = "batch") -> VQAScores:
    """Score `predictions[i]` against `references[i]`.

    Raises ValueError when the two differ in number, when there are none, or for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose 'batch' or 'gated'")
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references but {len(predictions)} predictions: give one prediction for each")
    if not references:
        raise ValueError("there is nothing to score: no references were given")
    items = tuple(_score(r, p, variant) for r, p in zip(references, predictions, strict=True))
    means = {}
    for metric, name in METRICS.items():
        values = [value for item in items if (value := getattr(item, name)) is not None]
        means[metric] = 100.0 * fmean(values) if values else None
    n_closed = sum(item.answer_type == "CLOSED" for item in items)
    return VQAScores(**means, n_closed=n_closed, n_open=len(items) - n_closed, variant=variant, items=items)


def _score(reference: Reference, prediction: str, variant: str) -> ItemScore:
    if not isinstance(prediction, str):
        raise ValueError(f"the prediction for question {reference.id} is {prediction!r}: it must be a string")
    right, said = normalize(reference.answer), normalize(prediction)
    if reference.answer_type == "CLOSED":
        spoken = _YES_NO.findall(said)
        strict = right == said if right not in ("yes", "no") else spoken[:1] == [right]
        hit = right in said and (variant == "batch" or "yes" in said or "no" in said)
        scores = {"hit": float(hit), "strict_hit": float(strict), "yes_and_no": float(set(spoken) == {"yes", "no"})}
        return ItemScore(reference.id, "CLOSED", **scores)
    # The official token scores normalize a second time, which matters only for texts with more than 32 full stops.
    wanted, given = normalize(right).split(), normalize(said).split()
    recall, precision, f1 = token_scores(wanted, given)
    set_recall = len({*wanted} & {*given}) / len({*wanted}) if wanted else 0.0
    return ItemScore(reference.id, "OPEN", recall=recall, precision=precision, f1=f1, set_recall=set_recall)


def token_scores(reference: Sequence[str], prediction: Sequence[str]) -> tuple[float, float, float]:
    """Official recall, precision and F1 of a prediction's words, in [0, 1]; all 0 if nothing matches.

    The matches count the prediction's occurrences without clipping, so an answer that repeats one right word approaches
    recall 1: for "pleural effusion", "effusion" three times scores 0.75. Compare with the recall over distinct words.
    """
    wanted, given = Counter(reference), Counter(prediction)
    found = sum(count for word, count in given.items() if word in wanted)
    if not found:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in wanted.items() if word not in given)
    recall, precision = found / (found + missed), found / given.total()
    return recall, precision, 2 * recall * precision / (recall + precision)
