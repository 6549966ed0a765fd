"""The paper's numbers beside those that others recorded: the authors of a baseline, and the published annotation files.

The facts are constants here, with their source, so that the comparison needs no file; `medv.companion.audit.annotations` and
`medv.companion.audit.gaming` count those of the annotation files again where the files are given.
"""

from collections.abc import Iterator

from medv.companion.audit.findings import DIFFERS, OURS, REMARK, Finding, ceiling_reading
from medv.paper import table

ELSEWHERE = {"zero-shot": (28.23, 61.40, 39.17, 52.16), "VQA-RAD, 3064 training rows": (61.527, 84.1912)}
"""Open and closed values of LLaVA-Med v1 that Microsoft's own notebook records (LLaVA-Med v1.0.0)."""
IMAGES = 832
"""Different images in the published validation split of PathVQA."""
CEILINGS = {"vqa_rad": (254, 272), "slake": (355, 416), "pathvqa": (3391, 3391)}
"""Closed test questions that the references themselves answer rightly in the gated variant, of all."""
YES_NO = {"vqa_rad": (251, 272), "slake": (355, 416), "pathvqa": (3391, 3391)}
"""Closed test questions that the answer "yes no" to every question answers rightly in either variant, of all."""


def published_elsewhere() -> Iterator[Finding]:
    """Tables 2 and 4: rows of LLaVA-Med beside those that its authors recorded."""
    row = table("table4").iloc[0, 5:].tolist()
    recorded = ELSEWHERE["zero-shot"]
    same = all(round(value, 2) == other for value, other in zip(recorded, row, strict=True))
    printed, sums = (", ".join(f"{value:.2f}" for value in values) for values in (row, recorded))
    sums = f"LLaVA-Med v1, recorded by its authors: {sums}"
    digits = "the same" if same else "not the same"
    reading = f"The digits are {digits}; Table 7 names another version, llava-med-v1.5-mistral-7B."
    yield Finding("published elsewhere", "Table 4, LLaVA-Med, zero-shot VQA", printed, sums, REMARK, reading)
    printed = table("table2").set_index("model").loc["LLaVA-Med (From LLaVA)"].tolist()[:2]
    recorded = ELSEWHERE["VQA-RAD, 3064 training rows"]
    same = all(abs(value - other) < 0.0101 for value, other in zip(recorded, printed, strict=True))
    values = " and ".join(map(str, recorded))
    sums = f"recorded by its authors for a training set of 3064 rows: {values}; Table 8 gives 1797 rows"
    agree = "agree" if same else "do not agree"
    reading = f"The values {agree}, so the row and {OURS}'s may come from different training sets. "
    reading += "The further rows re-word test questions; `medv.companion.audit.annotations` counts them."
    printed = " and ".join(f"{value:.2f}" for value in printed)
    yield Finding("published elsewhere", "Table 2, LLaVA-Med, VQA-RAD", printed, sums, REMARK, reading)


def validation_images() -> Iterator[Finding]:
    """Table 8: images in the validation split of PathVQA."""
    printed = int(table("table8").set_index("detail").at["images", "pathvqa_val"])
    sums = f"{IMAGES} different images in the published file; {printed} is also the number for the test split"
    reading = "The cell and the published annotations have different numbers."
    yield Finding("data set counts", "Table 8, PathVQA, validation images", str(printed), sums, DIFFERS, reading)


def gated_ceilings() -> Iterator[Finding]:
    """Table 2: which of the two official variants of closed accuracy can give the printed values."""
    for name, (k, n) in CEILINGS.items():
        printed, ceiling = printed_closed(name), 100 * k / n
        sums = f"references as answers, gated variant: {k} / {n} = {ceiling:.2f}; other variant 100"
        where, reading = f"Table 2, {OURS}, {name} closed", ceiling_reading(printed, ceiling)
        yield Finding("metric variants", where, f"{printed:.2f}", sums, REMARK, reading)


def constant_answers() -> Iterator[Finding]:
    """Table 2: the score of the answer "yes no" to every closed question."""
    reading = "A property of the metric, which looks for the reference anywhere in the answer; no model is said to answer so."
    for name, (k, n) in YES_NO.items():
        sums = f'"yes no" to every question: {k} / {n} = {100 * k / n:.2f}'
        yield Finding("gaming", f"Table 2, {OURS}, {name} closed", f"{printed_closed(name):.2f}", sums, REMARK, reading)


def printed_closed(data: str) -> float:
    """The closed accuracy (percent) of LLaDA-MedV in Table 2."""
    return table("table2").set_index("model").at[OURS, f"{data}_closed_accuracy"]
