"""Closed accuracy and open recall of visual question answering (Tables 2 and 4), as the official evaluation computes them.

"Official" is LLaVA-Med v1.0.0, whose evaluation the paper uses; its two variants differ on closed questions. `batch` (the
default, and the one that can produce the paper's numbers) counts an answer as right when the normalized reference occurs
anywhere in the normalized prediction; `gated` also requires a "yes" or "no" somewhere in the prediction. Both reward verbose
answers: "yes no" is right for every yes/no question. Strict accuracy, recall over distinct words, and the share of answers
that say both yes and no are therefore reported beside them.

Answers are normalized by the rules of the VQA challenge in the form that LLaVA-Med v1.0.0 applies, oddities included, because
the published numbers depend on them. No stemming and no Unicode folding take place.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import numpy as np

from medv import limits
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
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_FREE_STOP = re.compile(r"\.(?!\d)")
_MAX_STOPS = 32  # the official call passes re.UNICODE (32) where the number of replacements belongs
_ARTICLES = frozenset(("a", "an", "the"))
_UP_TO_TEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", "zero": "0"} | {word: str(number) for number, word in enumerate(_UP_TO_TEN, start=1)}
# A token that lacks exactly one apostrophe of one of these forms gets it back: "cant", "couldnt've".
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""
_CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form for form in _CONTRACTED.split() for place, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official map has this one the wrong way round


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
        limits.named("metric", metric, METRICS)
        found = (getattr(item, METRICS[metric]) for item in self.items)
        return np.array([100.0 * value for value in found if value is not None])


def normalize(text: str) -> str:
    """The comparable form of an answer: lower case, marks resolved, number words as digits, no articles; possibly empty.

    A mark is deleted throughout when it touches a space anywhere in the text or when the text has a comma between digits
    ("1,000"), and is replaced by a space otherwise: "x-ray" becomes "x ray", "T2-weighted - image" "t2weighted image".
    """
    text = original = text.lower()
    grouped = _GROUPED_DIGITS.search(original) is not None
    for mark in _MARKS:
        delete = grouped or mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if delete else " ")
    text = _FREE_STOP.sub("", text, count=_MAX_STOPS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def evaluate_vqa(references: Sequence[Reference], predictions: Sequence[str], *, variant: str = "batch") -> VQAScores:
    """Score `predictions[i]` against `references[i]`.

    Raises ValueError when the two differ in number, when there are none, or for an unknown variant.
    """
    limits.named("variant", variant, VARIANTS)
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
    right, predicted = normalize(reference.answer), normalize(prediction)
    if reference.answer_type == "CLOSED":
        yes_no = _YES_NO.findall(predicted)
        strict = right == predicted if right not in ("yes", "no") else yes_no[:1] == [right]
        hit = right in predicted and (variant == "batch" or "yes" in predicted or "no" in predicted)
        scores = {"hit": float(hit), "strict_hit": float(strict), "yes_and_no": float(set(yes_no) == {"yes", "no"})}
        return ItemScore(reference.id, "CLOSED", **scores)
    # The official token scores normalize a second time, which matters only for texts with more than 32 full stops.
    wanted, given = normalize(right).split(), normalize(predicted).split()
    recall, precision, f1 = token_scores(wanted, given)
    set_recall = len(set(wanted) & set(given)) / len(set(wanted)) if wanted else 0.0
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
