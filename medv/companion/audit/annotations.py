"""The checks of the paper that need the published files: annotations, recorded answers, a file of judgements.

Every finding carries its arithmetic. A file that is not there yields no finding, and nothing is downloaded.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from pathlib import Path

from medv.companion.audit.findings import OURS, REMARK, Finding, agreement, counts_that_give
from medv.companion.audit.paper import ceiling_reading, printed_closed
from medv.data.readers import data_set, read_dataset
from medv.evaluation.judge import read_judgements
from medv.evaluation.pairing import Reference
from medv.evaluation.text import read_answers
from medv.evaluation.vqa import evaluate_vqa
from medv.paper import table
from medv.reading import DataError

JUDGED, ANSWERED = "llava_med_eval_qa50_qa_ans.jsonl", "llava_med_60k_3epoch_answers.jsonl"


def annotation_findings(folders: Mapping[str, str | Path | None]) -> list[Finding]:
    """The findings on the data sets whose folder is given: vqa_rad, slake, pathvqa, qa50."""
    checks: dict[str, tuple[Callable[[Path], Iterator[Finding]], ...]] = {
        "vqa_rad": (shared_answers, lambda folder: gate("vqa_rad", folder)),
        "slake": (lambda folder: gate("slake", folder),),
        "pathvqa": (lambda folder: gate("pathvqa", folder), repeated_rows, validation_images),
        "qa50": (judge_scatter, counting_rules),
    }
    if unknown := set(folders) - set(checks):
        raise ValueError(f"unknown data set {', '.join(sorted(unknown))}: choose from {', '.join(checks)}")
    given = [(check, Path(folder)) for name, folder in folders.items() if folder for check in checks[name]]
    return [finding for check, folder in given for finding in check(folder)]


def gate(name: str, folder: Path) -> Iterator[Finding]:
    """The two official variants of closed accuracy, on answers that are the references."""
    references = [Reference.of(example) for example in read_dataset(name, folder, "test")]
    scores = {v: evaluate_vqa(references, [r.answer for r in references], variant=v) for v in ("gated", "batch")}
    n, printed = scores["batch"].n_closed, printed_closed(name)
    if not n:
        return
    sums = [f"{v} {round(s.closed_accuracy * n / 100)} / {n} = {s.closed_accuracy:.2f}" for v, s in scores.items()]
    where, arithmetic = f"Table 2, {OURS}, {name} closed, counted from the files", f"references as answers: {', '.join(sums)}"
    reading = ceiling_reading(printed, scores["gated"].closed_accuracy)
    yield Finding("metric variants", where, f"{printed:.2f}", arithmetic, REMARK, reading)


def shared_answers(folder: Path) -> Iterator[Finding]:
    """VQA-RAD: open test questions whose image and answer stand in the training rows, without and with re-worded rows."""
    test = [example for example in read_dataset("vqa_rad", folder, "test") if example.answer_type == "OPEN"]
    for frames in (False, True) if test else ():
        train = read_dataset("vqa_rad", folder, "train", all_rows=frames)
        known = {(example.meta["image"], example.answer.strip().lower()) for example in train}
        shared = sum((example.meta["image"], example.answer.strip().lower()) in known for example in test)
        where = f"Table 8, VQA-RAD, {len(train)} training rows {'with' if frames else 'without'} re-worded test questions"
        share = f"{shared} of {len(test)} open test questions ({100 * shared / len(test):.1f} %)"
        reading = "Open recall after training on the one set and on the other measures different things."
        sums = f"{share} have their image and answer there"
        yield Finding("shared answers", where, "1797 training rows", sums, REMARK, reading)


def repeated_rows(folder: Path) -> Iterator[Finding]:
    """PathVQA: the closed count with and without repeated rows, against the printed accuracy."""
    printed = printed_closed("pathvqa")
    for drop in (False, True):
        rows = read_dataset("pathvqa", folder, "test", drop_duplicates=drop)
        if not (n := sum(example.answer_type == "CLOSED" for example in rows)):
            return
        found = counts_that_give(printed, n)
        sums = f"{found[0]} / {n} = {100 * found[0] / n:.4f}" if found else f"no k / {n} gives it"
        where = f"Table 2, {OURS}, PathVQA closed, {len(rows)} test rows {'without' if drop else 'with'} repeated ones"
        reading = "A whole count gives it." if found else "No count of right answers gives it."
        yield Finding("closed counts", where, f"{printed:.2f}", sums, agreement(bool(found)), reading)


def validation_images(folder: Path) -> Iterator[Finding]:
    """PathVQA: images of the validation split."""
    printed = int(table("table8").set_index("detail").at["images", "pathvqa_val"])
    try:
        data_set("pathvqa").find(folder, "validation")
    except DataError:  # it is not there
        return
    counted = len({example.meta["image"] for example in read_dataset("pathvqa", folder, "validation")})
    where, sums = "Table 8, PathVQA, validation images, counted from the files", f"{counted} different images in the file"
    reading = "Counted from the published annotations; the test split has 858."
    yield Finding("data set counts", where, str(printed), sums, agreement(counted == printed), reading)


def judge_scatter(folder: Path) -> Iterator[Finding]:
    """qa50: the standard error of the mean of judged questions, and the ratio of means instead of the mean of ratios."""
    if not (folder / JUDGED).exists():
        return
    scores = read_judgements(folder / JUDGED)
    values = scores.relative()
    if len(values) < 2:  # which scatter by nothing
        return
    error = float(values.std(ddof=1)) / sqrt(len(values))
    where, spread = "Tables 1, 3, 4 and 5, overall score", f"standard deviation {values.std(ddof=1):.1f}, n = {len(values)}"
    sums = f"public judgements of another model: mean {values.mean():.3f}, {spread}: "
    sums += f"standard error {error:.2f}, 95 % +- {1.96 * error:.1f} points"
    reading = "Two scores of different answers to the same questions that differ by less than this are hard to tell apart. "
    reading += "Group C of Table 5 spans 1.39 points. Pairing the questions would narrow the interval."
    yield Finding("judge scatter", where, "no intervals", sums, REMARK, reading)
    ours, theirs = sum(item.candidate for item in scores.judged), sum(item.reference for item in scores.judged)
    sums = f"mean of ratios {values.mean():.3f}; ratio of means {ours:g} / {theirs:g} = {100 * ours / theirs:.3f}"
    where, printed = "Section 5.2, relative score", "normalized by the reference score"
    reading = "The official script takes the mean of ratios; the text fits both."
    yield Finding("metric variants", where, printed, sums, REMARK, reading)


def counting_rules(folder: Path) -> Iterator[Finding]:
    """qa50: words per query of recorded answers under several rules of counting."""
    if not (folder / ANSWERED).exists():
        return
    texts = [row.answer() for row in read_answers(folder / ANSWERED)]
    rules: dict[str, Callable[[str], int]] = {
        "split at white space": lambda text: len(text.split()),
        "letters and digits": lambda text: len(re.findall(r"\w+", text)),
        "different words": lambda text: len(set(text.lower().split())),
    }
    counts = {name: sum(map(rule, texts)) for name, rule in rules.items()}
    sums = "; ".join(f"{name} {count} / {len(texts)} = {count / len(texts):.3f}" for name, count in counts.items())
    reading = (
        "Recorded answers of an earlier LLaVA-Med; the rule of counting moves the number, and the paper does not name its own."
    )
    yield Finding("words per query", "Table 3, W/Q", "one number per model", sums, REMARK, reading)
