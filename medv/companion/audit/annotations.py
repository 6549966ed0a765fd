"""The part of the paper's audit that needs the published files: annotations, recorded answers, a file of judgements.

As in `audit.paper`, every finding carries its arithmetic. A file that is not there yields no finding, and nothing is
downloaded.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from pathlib import Path

from medv.companion.audit.finding import AGREES, DIFFERS, REMARK, Finding
from medv.companion.audit.paper import OURS, counts_that_give
from medv.data.example import Example
from medv.data.readers import find_file, read_dataset, read_vqa_rad
from medv.evaluation.judge import read_judgements
from medv.evaluation.pairing import Reference
from medv.evaluation.text import read_answers
from medv.evaluation.vqa import evaluate_vqa
from medv.paper import table

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
    scores = {v: evaluate_vqa(references, [r.answer for r in references], variant=v) for v in ("batch", "gated")}
    n, printed = scores["batch"].n_closed, table("table2").set_index("model").at[OURS, f"{name}_closed_accuracy"]
    ceilings = {variant: score.closed_accuracy for variant, score in scores.items()}
    above = printed > ceilings["gated"]
    yield Finding(
        "metric variants",
        f"Table 2, {OURS}, {name} closed, counted from the files",
        f"{printed:.2f}",
        f"references as answers: gated {round(ceilings['gated'] * n / 100)} / {n} = {ceilings['gated']:.2f}, "
        f"batch {round(ceilings['batch'] * n / 100)} / {n} = {ceilings['batch']:.2f}",
        REMARK,
        "Above what the references themselves reach in the gated variant: the other one gives such a value."
        if above
        else "Both variants could give it.",
    )


def shared_answers(folder: Path) -> Iterator[Finding]:
    """VQA-RAD: open test questions whose image and answer stand in the training rows, without and with re-worded rows."""
    test = [example for example in read_dataset("vqa_rad", folder, "test") if example.answer_type == "OPEN"]
    path = find_file("vqa_rad", folder, "train")
    for frames in (False, True):
        train = read_vqa_rad(path, frame_rows=frames)
        known = {_image_and_answer(example) for example in train}
        shared = sum(_image_and_answer(example) in known for example in test)
        yield Finding(
            "shared answers",
            f"Table 8, VQA-RAD, {len(train)} training rows {'with' if frames else 'without'} re-worded test questions",
            "1797 training rows",
            f"{shared} of {len(test)} open test questions ({100 * shared / len(test):.1f} %) have their image and answer there",
            REMARK,
            "Open recall after training on the one set and on the other measures different things.",
        )


def _image_and_answer(example: Example) -> tuple[str, str]:
    return example.meta["image"], example.answer.strip().lower()


def repeated_rows(folder: Path) -> Iterator[Finding]:
    """PathVQA: the closed count with and without repeated rows, against the printed accuracy."""
    printed = table("table2").set_index("model").at[OURS, "pathvqa_closed_accuracy"]
    for drop in (False, True):
        rows = read_dataset("pathvqa", folder, "test", drop_duplicates=drop)
        n = sum(example.answer_type == "CLOSED" for example in rows)
        found = counts_that_give(printed, n)
        sums = f"{found[0]} / {n} = {100 * found[0] / n:.4f}" if found else f"no k / {n} gives it"
        yield Finding(
            "closed counts",
            f"Table 2, {OURS}, PathVQA closed, {len(rows)} test rows {'without' if drop else 'with'} repeated ones",
            f"{printed:.2f}",
            sums,
            AGREES if found else DIFFERS,
            "A whole count gives it." if found else "No count of right answers gives it.",
        )


def validation_images(folder: Path) -> Iterator[Finding]:
    """PathVQA: images of the validation split."""
    printed = int(table("table8").set_index("detail").at["images", "pathvqa_val"])
    counted = len({example.meta["image"] for example in read_dataset("pathvqa", folder, "val")})
    yield Finding(
        "data set counts",
        "Table 8, PathVQA, validation images, counted from the files",
        str(printed),
        f"{counted} different images in the file",
        AGREES if counted == printed else DIFFERS,
        "Counted from the published annotations; the test split has 858.",
    )


def judge_scatter(folder: Path) -> Iterator[Finding]:
    """qa50: how far the mean of judged questions scatters, and what a ratio of means would give."""
    if not (folder / JUDGED).exists():
        return
    scores = read_judgements(folder / JUDGED)
    values = scores.relative()
    error = float(values.std(ddof=1)) / sqrt(len(values))
    sums = sum(item.candidate for item in scores.judged), sum(item.reference for item in scores.judged)
    yield Finding(
        "judge scatter",
        "Tables 1, 3, 4 and 5, overall score",
        "no intervals",
        f"public judgements of another model: mean {values.mean():.3f}, standard deviation {values.std(ddof=1):.1f}, n = "
        f"{len(values)}: standard error {error:.2f}, 95 % +- {1.96 * error:.1f} points",
        REMARK,
        "Two scores of different answers to the same questions that differ by less than this are hard to tell apart. "
        "Group C of Table 5 spans 1.39 points. Pairing the questions would narrow the interval.",
    )
    yield Finding(
        "metric variants",
        "Section 5.2, relative score",
        "normalized by the reference score",
        f"mean of ratios {values.mean():.3f}; ratio of means {sums[0]:g} / {sums[1]:g} = {100 * sums[0] / sums[1]:.3f}",
        REMARK,
        "The official script takes the mean of ratios; the text fits both.",
    )


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
    yield Finding(
        "words per query",
        "Table 3, W/Q",
        "one number per model",
        "; ".join(f"{name} {count} / {len(texts)} = {count / len(texts):.3f}" for name, count in counts.items()),
        REMARK,
        "Recorded answers of an earlier LLaVA-Med; the rule of counting moves the number, and the paper does not name its own.",
    )
