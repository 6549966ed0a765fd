"""Checks of the paper's tables and text: recomputed from each other, and beside numbers that others recorded.

Each finding carries its arithmetic; numbers that agree are findings too, and the reason for a difference is not guessed. The
recorded numbers are constants with their source; `audit.annotations` and `audit.gaming` count those of the annotation files
again where the files are given.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from medv.companion.audit.findings import AGREES, DIFFERS, OURS, REMARK, Finding, agreement, counts_that_give
from medv.paper import table

CLOSED = ("vqa_rad", "slake", "pathvqa")
"""Data sets whose closed accuracy Table 2 prints."""
TYPES = ("conversation", "description")
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
GAINS = {"LLaVA-Med": 7.855, "LLaDA-V": 1.867, "MedVLM-R1": 2.45}
"""Gains over other models in the abstract and section 5.2, called percent there."""
TOTALS = {
    "VQA-RAD pairs": ("vqa_rad", "qa_pairs", 2248),
    "SLAKE images": ("slake", "images", 642),
    "PathVQA images": ("pathvqa", "images", 4998),
    "PathVQA pairs": ("pathvqa", "qa_pairs", 32799),
}
"""Totals in the text of appendix A.3, each with its data set and its row of Table 8."""
ELSEWHERE = {"zero-shot": (28.23, 61.40, 39.17, 52.16), "VQA-RAD, 3064 training rows": (61.527, 84.1912)}
"""Open and closed values of LLaVA-Med v1 that Microsoft's own notebook records (LLaVA-Med v1.0.0)."""
IMAGES = 832
"""Different images in the published validation split of PathVQA."""
CEILINGS = {"vqa_rad": (254, 272), "slake": (355, 416), "pathvqa": (3391, 3391)}
"""Closed test questions that the references themselves answer rightly in the gated variant, of all."""
YES_NO = {"vqa_rad": (251, 272), "slake": (355, 416), "pathvqa": (3391, 3391)}
"""Closed test questions that the answer "yes no" to every question answers rightly in either variant, of all."""


def audit() -> list[Finding]:
    """Every check of this module."""
    checks = (
        *(weighted_means, gains, closed_counts, margins_in_questions, words_and_seconds, seconds_per_step),
        *(table5_settings, dataset_counts, equal_cells),
        *(published_elsewhere, validation_images, gated_ceilings, constant_answers),
    )
    return [finding for check in checks for finding in check()]


def weighted_means() -> Iterator[Finding]:
    """Table 1: is the overall score the mean over questions, by type and by domain?"""
    counts = table("table1_counts").loc[0]
    agree = []
    for row in table("table1").to_dict("records"):
        by_type, by_domain = (
            sum(counts[name] * row[name] for name in names) / sum(counts[name] for name in names) for names in (TYPES, DOMAINS)
        )
        if max(abs(mean - row["overall"]) for mean in (by_type, by_domain)) < 0.0015:
            agree.append(row["model"])
            continue
        where, terms = f"Table 1, {row['model']}, overall", " + ".join(f"{counts[name]} x {row[name]:.3f}" for name in TYPES)
        sums = f"by type ({terms}) / 193 = {by_type:.3f}; by domain {by_domain:.3f}"
        reading = "The overall score lies below both means that its own row allows; the two also differ from each other."
        yield Finding("weighted means", where, f"{row['overall']:.3f}", sums, DIFFERS, reading)
    where = f"Table 1, {len(agree)} other rows, overall"
    sums = "mean over 193 questions, once by type (143, 50) and once by domain (37, 38, 44, 34, 40)"
    reading = f"Both means equal the printed score within 0.001 for {', '.join(agree)}."
    yield Finding("weighted means", where, "one score per row", sums, AGREES, reading)


def gains() -> Iterator[Finding]:
    """Abstract and section 5.2: differences in points, called relative gains in percent."""
    rows = table("table1").set_index("model")
    ours = rows.at[OURS, "overall"]
    for name, printed in GAINS.items():
        other = rows.at[name, "overall"]
        points = ours - other
        sums = f"{ours:.3f} - {other:.3f} = {points:.3f} points; / {other:.3f} = {100 * points / other:.2f} %"
        reading = "The printed number is the difference in points of the score; the relative gain is the second number."
        yield Finding("gains", f"Text, gain over {name}", f"{printed} %", sums, REMARK, reading)
    columns = [*TYPES, *DOMAINS]
    for name in ("LLaVA-Med", "MedVLM-R1"):
        lower = [column for column in columns if rows.at[OURS, column] < rows.at[name, column]]
        terms = ", ".join(f"{column} {rows.at[OURS, column]:.3f} < {rows.at[name, column]:.3f}" for column in lower)
        sums = f"higher in {len(columns) - len(lower)} of {len(columns)} columns; lower: {terms or 'none'}"
        reading = "How many columns are higher, counted; the table gives no intervals."
        yield Finding("gains", f"Section 5.2, against {name}", '"across nearly all subjects"', sums, REMARK, reading)


def closed_counts() -> Iterator[Finding]:
    """Tables 2 and 4: is each closed accuracy k / n for a whole k and the n of Table 8?"""
    others: dict[str, list[str]] = {}
    for name in ("table2", "table4"):
        rows = table(name).set_index("model")
        for data in CLOSED:
            column, n = f"{data}_closed_accuracy", _closed_questions(data)
            for model, percent in rows[column].dropna().items() if column in rows else ():
                fit, sums = _fit(percent, n)
                if model != OURS:
                    others.setdefault(fit, []).append(f"{model}, {data} {percent:.2f}: {sums}")
                    continue
                reading = "A whole count gives it."
                if fit != "fits":
                    denominators = [str(m) for m in range(n - 41, n + 1) if counts_that_give(percent, m)]
                    sums += f"; of {n - 41} to {n} questions these numbers could give it: {', '.join(denominators) or 'none'}"
                    reading = (
                        "No count of right answers out of the questions of Table 8 gives it. 3362, one of the numbers that do, "
                        "is the count of closed questions in the copy of PathVQA without repeated rows."
                    )
                where = f"Table {name[-1]}, {OURS}, {column}"
                yield Finding("closed counts", where, f"{percent:.2f}", sums, agreement(fit == "fits"), reading)
    for fit, cells in others.items():
        where = f"Tables 2 and 4, {len(cells)} cells of other models"
        verdict = AGREES if fit == "fits" else REMARK
        reading = (
            f"Each {fit} as a count over the questions of Table 8. The cells are taken over from other work, in part with "
        )
        reading += "other test sets."
        yield Finding("closed counts", where, "closed accuracy, percent", "; ".join(cells), verdict, reading)


def _closed_questions(data: str) -> int:
    return int(table("table8").set_index("detail").at["closed_form", f"{data}_test"])


def _fit(percent: float, n: int) -> tuple[str, str]:
    """Whether a whole count gives the percentage, and the sum that shows it."""
    for places, fit in ((2, "fits"), (1, "fits when read with one decimal")):
        found = counts_that_give(percent, n, places=places) if round(percent, places) == percent else []
        if found:
            return fit, f"{found[0]} / {n} = {100 * found[0] / n:.4f}"
    below = int(percent * n / 100)
    return "does not fit", " and ".join(f"{k} / {n} = {100 * k / n:.4f}" for k in (below, below + 1))


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share k / n, in percent."""
    z = 1.959964
    share, width = k / n, z * np.sqrt(k * (n - k) / n**3 + (z / n) ** 2 / 4)
    center = share + z**2 / (2 * n)
    return tuple(float(100 * (center + sign * width) / (1 + z**2 / n)) for sign in (-1, 1))


def margins_in_questions() -> Iterator[Finding]:
    """Table 2: by how many questions the best closed accuracy leads the second best whose count is known."""
    rows = table("table2").set_index("model")
    for data in CLOSED:
        column, n = f"{data}_closed_accuracy", _closed_questions(data)
        known = {model: found[0] for model, value in rows[column].dropna().items() if (found := counts_that_give(value, n))}
        k = known.pop(OURS, None)
        if k is None:
            continue
        second = max(known, key=known.get)
        low, high = wilson(k, n)
        printed = f"{rows.at[OURS, column]:.2f} and {rows.at[second, column]:.2f}"
        sums = f"{k} - {known[second]} = {k - known[second]} of {n} questions; 95 % of {k} / {n}: {low:.1f} to {high:.1f}"
        reading = "The lead in questions, beside the interval of one accuracy (Wilson); the table gives no intervals."
        yield Finding("margins", f"Table 2, {column}, {OURS} and {second}", printed, sums, REMARK, reading)


def words_and_seconds() -> Iterator[Finding]:
    """Table 3: are words per query whole numbers over 193, and is T/W = T/Q / W/Q?"""
    rows = table("table3")
    words = rows["words_per_query"]
    totals = [round(value * 193) for value in words]
    whole = all(abs(total / 193 - value) < 0.00051 for total, value in zip(totals[:-1], words, strict=False))
    printed, sums = ", ".join(f"{value:g}" for value in words), f"x 193 = {', '.join(map(str, totals))} words"
    reading = "Each is a whole number of words over the 193 questions. The table does not say what counts as a word."
    yield Finding("words per query", "Table 3, W/Q", printed, sums, agreement(whole), reading)
    for row in rows.to_dict("records"):
        ratio = row["seconds_per_query"] / row["words_per_query"]
        label = row["model"] if pd.isna(row["sampling_steps"]) else f"{row['model']}, Z = {row['sampling_steps']:.0f}"
        where, printed = f"Table 3, {label} ({row['note']})", f"{row['seconds_per_word']:.3f}"
        sums = f"{row['seconds_per_query']:.3f} / {row['words_per_query']:.3f} = {ratio:.4f}"
        verdict = agreement(abs(ratio - row["seconds_per_word"]) <= 0.00051)
        yield Finding("seconds per word", where, printed, sums, verdict, "T/W is T/Q over W/Q.")
    slow, fast = rows.iloc[2], rows.iloc[0]
    word, query = (slow[name] / fast[name] for name in ("seconds_per_word", "seconds_per_query"))
    printed = f"{fast['seconds_per_word']:.3f} to {slow['seconds_per_word']:.3f} s per word"
    seconds = f"{slow['seconds_per_query']} / {fast['seconds_per_query']}"
    sums = f"per word {word:.1f} times; per query {seconds} = {query:.1f} times"
    reading = "The text gives the ratio per word; per query, where a longer answer also takes longer, it is larger."
    yield Finding("seconds per word", "Section 6.1, cost of LLaDA-MedV", printed, sums, REMARK, reading)


def seconds_per_step() -> Iterator[Finding]:
    """Table 3: the cost of one sampling step at each Z."""
    rows = table("table3").dropna(subset=["sampling_steps"])
    pairs = list(zip(rows["seconds_per_query"], rows["sampling_steps"], strict=True))
    (first_t, first_z), (last_t, last_z) = pairs[0], pairs[-1]
    printed = f"Z from {first_z:.0f} to {last_z:.0f}"
    sums = "; ".join(f"{t:.3f} / {z:.0f} = {t / z:.3f} s" for t, z in pairs)
    ratio = last_t / last_z / (first_t / first_z)
    reading = f"A step costs {ratio:.1f} times as much at Z = 16 as at Z = 256, on a canvas of the same length. "
    reading += "The number of network calls really made is not printed, so what the time went into cannot be settled."
    yield Finding("seconds per step", "Table 3, T/Q against Z", printed, sums, REMARK, reading)


def table5_settings() -> Iterator[Finding]:
    """Table 5: steps per block are Z B / L, and a setting that stands twice has one score."""
    rows = table("table5")
    given = rows["sampling_steps"] * rows["block_length"] / rows["generation_length"]
    printed, sums = ", ".join(map(str, rows["steps_per_block"])), f"Z x B / L = {', '.join(f'{value:g}' for value in given)}"
    verdict = agreement((given == rows["steps_per_block"]).all())
    yield Finding("settings", "Table 5, steps per block", printed, sums, verdict, "Z counts steps over all blocks.")
    for key, part in rows.groupby(["generation_length", "block_length", "sampling_steps"], sort=False):
        if len(part) > 1:
            scores = part["overall_score"].tolist()
            where = f"Table 5, groups {' and '.join(part['group'])}, L, B, Z = {', '.join(map(str, key))}"
            printed, sums = " and ".join(f"{score:.3f}" for score in scores), f"difference {abs(scores[0] - scores[1]):.3f}"
            reading = "The same setting in two groups has one score."
            yield Finding("settings", where, printed, sums, agreement(scores[0] == scores[1]), reading)
    scores = rows[rows["group"] == "C"]["overall_score"]
    low, high = scores.min(), scores.max()
    sums = f"{high:.3f} - {low:.3f} = {high - low:.3f} points over four block lengths"
    reading = "The whole effect of the block length. The table gives no intervals; how far the mean of 193 judged questions "
    reading += "scatters can be measured on any file of judgements."
    yield Finding("settings", "Table 5, group C (block length)", f"{low:.3f} to {high:.3f}", sums, REMARK, reading)


def dataset_counts() -> Iterator[Finding]:
    """Table 8 and appendix A.3: do closed and open add up, and do the splits add up to the totals of the text?"""
    rows = table("table8").set_index("detail").astype(int)
    pairs, closed, open_ = rows.loc["qa_pairs"], rows.loc["closed_form"], rows.loc["open_form"]
    sums = ", ".join(f"{closed[name]} + {open_[name]}" for name in rows.columns)
    verdict = agreement((closed + open_ == pairs).all())
    where = "Table 8, closed + open = QA pairs"
    yield Finding("data set counts", where, ", ".join(map(str, pairs)), sums, verdict, "In every split.")
    for label, (data, row, total) in TOTALS.items():
        parts = [int(rows.at[row, name]) for name in rows.columns if name.startswith(data)]
        same = sum(parts) == total
        where, sums = f"Appendix A.3 and Table 8, {label}", f"{' + '.join(map(str, parts))} = {sum(parts)}"
        reading = "The splits add up to the text." if same else "The splits of the table do not add up to the text."
        yield Finding("data set counts", where, f"{total} in the text", sums, agreement(same), reading)


def equal_cells() -> Iterator[Finding]:
    """Table 2: equal cells in one row or one column of different benchmarks or models."""
    rows = table("table2").set_index("model")
    reading = "The same two decimals in two cells. It may be so; the tables cannot tell."
    for label, cells in [*rows.iterrows(), *rows.items()]:
        for (one, value), (other, same) in combinations(cells.items(), 2):
            if value == same:
                where = f"Table 2, {label}: {one} and {other}"
                yield Finding("equal cells", where, f"{value:.2f}", f"{value:.2f} = {value:.2f}", REMARK, reading)


# --- Beside recorded numbers ---


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
    reading += "The further rows re-word test questions; the checks of the annotation files count them."
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


def ceiling_reading(printed: float, ceiling: float) -> str:
    """What the gated ceiling says about a printed closed accuracy (percent)."""
    if printed > ceiling:
        return "Above what the references themselves reach in the gated variant: the other one gives such a value."
    return "Both variants could give it."


def printed_closed(data: str) -> float:
    """The closed accuracy (percent) of LLaDA-MedV in Table 2."""
    return table("table2").set_index("model").at[OURS, f"{data}_closed_accuracy"]
