"""What can be recomputed from the paper's own tables and text, and whether it comes out as printed.

Each finding carries its arithmetic, so that a reader can check it by hand; numbers that agree are findings too. A difference
is a difference: why it is there the tables do not say, and nothing here guesses. What needs the data themselves is in
`medv.companion.audit.annotations`. Section and table numbers are those of the paper.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from medv.companion.audit.finding import AGREES, DIFFERS, REMARK, Finding
from medv.companion.audit.recorded import constant_answers, gated_ceilings, published_elsewhere, validation_images
from medv.paper import table

OURS, TYPES = "LLaDA-MedV", ("conversation", "description")
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
IN_TEXT = {
    "gain over LLaVA-Med": 7.855,
    "gain over LLaDA-V": 1.867,
    "gain over MedVLM-R1": 2.45,
    "VQA-RAD pairs": 2248,
    "SLAKE images": 642,
    "PathVQA images": 4998,
    "PathVQA pairs": 32799,
}
"""Numbers that stand in the text (abstract, section 5.2, appendix A.3)."""
CLOSED = {
    "vqa_rad_closed_accuracy": "vqa_rad_test",
    "slake_closed_accuracy": "slake_test",
    "pathvqa_closed_accuracy": "pathvqa_test",
}
"""Columns of Tables 2 and 4, and the column of Table 8 that counts their questions."""


def audit() -> list[Finding]:
    """Every check of this module and of `recorded`."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        weighted_means,
        gains,
        closed_counts,
        margins_in_questions,
        words_and_seconds,
        seconds_per_step,
        table5_settings,
        dataset_counts,
        equal_cells,
        published_elsewhere,
        validation_images,
        gated_ceilings,
        constant_answers,
    )
    return [finding for check in checks for finding in check()]


def counts_that_give(percent: float, n: int, *, places: int = 2) -> list[int]:
    """The counts k for which 100 k / n rounds to `percent` at `places` decimals; empty if there is none."""
    if n < 1:
        raise ValueError(f"n is {n}: a percentage needs at least one question")
    nearest = round(percent * n / 100)
    half = 0.5 * 10**-places + 1e-9
    return [k for k in range(max(0, nearest - 2), min(n, nearest + 2) + 1) if abs(100 * k / n - percent) <= half]


def weighted_means() -> Iterator[Finding]:
    """Table 1: is the overall score the mean over questions, by type and by domain?"""
    counts = table("table1_counts").loc[0]
    agree = []
    for row in table("table1").to_dict("records"):
        means = {}
        for kind, names in (("type", TYPES), ("domain", DOMAINS)):
            means[kind] = sum(counts[name] * row[name] for name in names) / sum(counts[name] for name in names)
        if max(abs(mean - row["overall"]) for mean in means.values()) < 0.0015:
            agree.append(row["model"])
            continue
        spelled = " + ".join(f"{counts[name]} x {row[name]:.3f}" for name in TYPES)
        yield Finding(
            "weighted means",
            f"Table 1, {row['model']}, overall",
            f"{row['overall']:.3f}",
            f"by type ({spelled}) / 193 = {means['type']:.3f}; by domain {means['domain']:.3f}",
            DIFFERS,
            "The overall score lies below both means that its own row allows; the two also differ from each other.",
        )
    yield Finding(
        "weighted means",
        f"Table 1, {len(agree)} other rows, overall",
        "one score per row",
        "mean over 193 questions, once by type (143, 50) and once by domain (37, 38, 44, 34, 40)",
        AGREES,
        f"Both means equal the printed score within 0.001 for {', '.join(agree)}.",
    )


def gains() -> Iterator[Finding]:
    """Abstract and section 5.2: differences in points, called relative gains in percent."""
    overall = table("table1").set_index("model")["overall"]
    for name in ("LLaVA-Med", "LLaDA-V", "MedVLM-R1"):
        points = overall[OURS] - overall[name]
        relative = 100 * points / overall[name]
        yield Finding(
            "gains",
            f"Text, gain over {name}",
            f"{IN_TEXT[f'gain over {name}']} %",
            f"{overall[OURS]:.3f} - {overall[name]:.3f} = {points:.3f} points; / {overall[name]:.3f} = {relative:.2f} %",
            REMARK,
            "The printed number is the difference in points of the score; the relative gain is the second number.",
        )
    rows = table("table1").set_index("model")
    columns = [*TYPES, *DOMAINS]
    for name in ("LLaVA-Med", "MedVLM-R1"):
        lower = [column for column in columns if rows.at[OURS, column] < rows.at[name, column]]
        spelled = ", ".join(f"{column} {rows.at[OURS, column]:.3f} < {rows.at[name, column]:.3f}" for column in lower)
        yield Finding(
            "gains",
            f"Section 5.2, against {name}",
            '"across nearly all subjects"',
            f"higher in {len(columns) - len(lower)} of {len(columns)} columns; lower: {spelled or 'none'}",
            REMARK,
            "How many columns are higher, counted; the table gives no intervals.",
        )


def closed_counts() -> Iterator[Finding]:
    """Tables 2 and 4: is each closed accuracy k / n for a whole k and the n of Table 8?"""
    closed = table("table8").set_index("detail").loc["closed_form"].astype(int)
    others: dict[str, list[str]] = {}
    for name in ("table2", "table4"):
        rows = table(name)
        for column, split in CLOSED.items():
            for row in rows.to_dict("records") if column in rows else ():
                if pd.isna(row[column]):
                    continue
                fit, sums = _fit(row[column], int(closed[split]))
                if row["model"] == OURS:
                    yield _own_count(f"Table {name[-1]}, {OURS}, {column}", row[column], int(closed[split]), sums, fit)
                else:
                    others.setdefault(fit, []).append(f"{row['model']}, {split[:-5]} {row[column]:.2f}: {sums}")
    for fit, cells in others.items():
        yield Finding(
            "closed counts",
            f"Tables 2 and 4, {len(cells)} cells of other models",
            "closed accuracy, percent",
            "; ".join(cells),
            AGREES if fit == "fits" else REMARK,
            f"Each {fit} as a count over the questions of Table 8. The cells are taken over from other work, in part with "
            "other test sets.",
        )


def _fit(percent: float, n: int) -> tuple[str, str]:
    """Whether a whole count gives the percentage, in words, and the sum."""
    for places, words in ((2, "fits"), (1, "fits when read with one decimal")):
        found = counts_that_give(percent, n, places=places) if round(percent, places) == percent else []
        if found:
            return words, f"{found[0]} / {n} = {100 * found[0] / n:.4f}"
    below = int(percent * n / 100)
    return "does not fit", " and ".join(f"{k} / {n} = {100 * k / n:.4f}" for k in (below, below + 1))


def _own_count(where: str, percent: float, n: int, sums: str, fit: str) -> Finding:
    if fit == "fits":
        return Finding("closed counts", where, f"{percent:.2f}", sums, AGREES, "A whole count gives it.")
    return Finding(
        "closed counts",
        where,
        f"{percent:.2f}",
        f"{sums}; of {n - 41} to {n} questions these numbers could give it: {denominators(percent, n)}",
        DIFFERS,
        "No count of right answers out of the questions of Table 8 gives it. 3362, one of the numbers that do, is the count "
        "of closed questions in the copy of PathVQA without repeated rows.",
    )


def denominators(percent: float, n: int, *, within: int = 41) -> str:
    """The denominators n - `within` .. n that do give a percentage, in words."""
    fit = [m for m in range(n - within, n + 1) if m > 0 and counts_that_give(percent, m)]
    return ", ".join(map(str, fit)) or "none"


def wilson(k: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson interval of a share k / n, in percent."""
    share, width = k / n, z * np.sqrt(k * (n - k) / n**3 + (z / n) ** 2 / 4)
    center = share + z**2 / (2 * n)
    return tuple(float(100 * (center + sign * width) / (1 + z**2 / n)) for sign in (-1, 1))


def margins_in_questions() -> Iterator[Finding]:
    """Table 2: by how many questions the best closed accuracy leads the second best whose count is known."""
    closed = table("table8").set_index("detail").loc["closed_form"].astype(int)
    rows = table("table2").set_index("model")
    for column, split in CLOSED.items():
        n = int(closed[split])
        fits = {model: counts_that_give(value, n) for model, value in rows[column].dropna().items()}
        k = (fits.pop(OURS) or [None])[0]
        known = {model: found[0] for model, found in fits.items() if found}
        second = max(known, key=known.get)
        if k is None:
            continue
        low, high = wilson(k, n)
        yield Finding(
            "margins",
            f"Table 2, {column}, {OURS} and {second}",
            f"{rows.at[OURS, column]:.2f} and {rows.at[second, column]:.2f}",
            f"{k} - {known[second]} = {k - known[second]} of {n} questions; 95 % of {k} / {n}: {low:.1f} to {high:.1f}",
            REMARK,
            "The lead in questions, beside the interval of one accuracy (Wilson); the table gives no intervals.",
        )


def words_and_seconds() -> Iterator[Finding]:
    """Table 3: are words per query whole numbers over 193, and is T/W = T/Q / W/Q?"""
    rows = table("table3")
    totals = [round(value * 193) for value in rows["words_per_query"]]
    whole = all(abs(total / 193 - value) < 0.00051 for total, value in zip(totals[:-1], rows["words_per_query"], strict=False))
    yield Finding(
        "words per query",
        "Table 3, W/Q",
        ", ".join(f"{value:g}" for value in rows["words_per_query"]),
        f"x 193 = {', '.join(map(str, totals))} words",
        AGREES if whole else DIFFERS,
        "Each is a whole number of words over the 193 questions. The table does not say what counts as a word.",
    )
    for row in rows.to_dict("records"):
        ratio = row["seconds_per_query"] / row["words_per_query"]
        label = row["model"] if pd.isna(row["sampling_steps"]) else f"{row['model']}, Z = {row['sampling_steps']:.0f}"
        yield Finding(
            "seconds per word",
            f"Table 3, {label} ({row['note']})",
            f"{row['seconds_per_word']:.3f}",
            f"{row['seconds_per_query']:.3f} / {row['words_per_query']:.3f} = {ratio:.4f}",
            AGREES if abs(ratio - row["seconds_per_word"]) <= 0.00051 else DIFFERS,
            "T/W is T/Q over W/Q.",
        )
    slow, fast = rows.iloc[2], rows.iloc[0]
    word, query = (slow[name] / fast[name] for name in ("seconds_per_word", "seconds_per_query"))
    yield Finding(
        "seconds per word",
        "Section 6.1, cost of LLaDA-MedV",
        f"{fast['seconds_per_word']:.3f} to {slow['seconds_per_word']:.3f} s per word",
        f"per word {word:.1f} times; per query {slow['seconds_per_query']} / {fast['seconds_per_query']} = {query:.1f} times",
        REMARK,
        "The text gives the ratio per word; per query, where a longer answer also takes longer, it is larger.",
    )


def seconds_per_step() -> Iterator[Finding]:
    """Table 3: what one sampling step costs at each Z."""
    rows = table("table3").dropna(subset=["sampling_steps"])
    costs = [t / z for t, z in zip(rows["seconds_per_query"], rows["sampling_steps"], strict=True)]
    shown = zip(rows["seconds_per_query"], rows["sampling_steps"], costs, strict=True)
    yield Finding(
        "seconds per step",
        "Table 3, T/Q against Z",
        f"Z from {rows['sampling_steps'].iloc[0]:.0f} to {rows['sampling_steps'].iloc[-1]:.0f}",
        "; ".join(f"{t:.3f} / {z:.0f} = {cost:.3f} s" for t, z, cost in shown),
        REMARK,
        f"A step costs {costs[-1] / costs[0]:.1f} times as much at Z = 16 as at Z = 256, on a canvas of the same length. "
        "The number of network calls really made is not printed, so what the time went into cannot be settled.",
    )


def table5_settings() -> Iterator[Finding]:
    """Table 5: steps per block are Z B / L, and a setting that stands twice has one score."""
    rows = table("table5")
    given = rows["sampling_steps"] * rows["block_length"] / rows["generation_length"]
    yield Finding(
        "settings",
        "Table 5, steps per block",
        ", ".join(map(str, rows["steps_per_block"])),
        f"Z x B / L = {', '.join(f'{value:g}' for value in given)}",
        AGREES if (given == rows["steps_per_block"]).all() else DIFFERS,
        "Z counts steps over all blocks.",
    )
    keys = ["generation_length", "block_length", "sampling_steps"]
    for key, part in rows.groupby(keys, sort=False):
        if len(part) > 1:
            scores = part["overall_score"].tolist()
            yield Finding(
                "settings",
                f"Table 5, groups {' and '.join(part['group'])}, L, B, Z = {', '.join(map(str, key))}",
                " and ".join(f"{score:.3f}" for score in scores),
                f"difference {abs(scores[0] - scores[1]):.3f}",
                AGREES if scores[0] == scores[1] else DIFFERS,
                "The same setting in two groups has one score.",
            )
    spread = rows[rows["group"] == "C"]["overall_score"]
    yield Finding(
        "settings",
        "Table 5, group C (block length)",
        f"{spread.min():.3f} to {spread.max():.3f}",
        f"{spread.max():.3f} - {spread.min():.3f} = {spread.max() - spread.min():.3f} points over four block lengths",
        REMARK,
        "The whole effect of the block length. The table gives no intervals; how far the mean of 193 judged questions "
        "scatters can be measured on any file of judgements.",
    )


def dataset_counts() -> Iterator[Finding]:
    """Table 8 and appendix A.3: do closed and open add up, and do the splits add up to the totals of the text?"""
    rows = table("table8").set_index("detail").astype(int)
    split_sums = rows.loc["closed_form"] + rows.loc["open_form"]
    yield Finding(
        "data set counts",
        "Table 8, closed + open = QA pairs",
        ", ".join(map(str, rows.loc["qa_pairs"])),
        ", ".join(f"{rows.at['closed_form', name]} + {rows.at['open_form', name]}" for name in rows.columns),
        AGREES if (split_sums == rows.loc["qa_pairs"]).all() else DIFFERS,
        "In every split.",
    )
    for label, row, prefix in (
        ("VQA-RAD pairs", "qa_pairs", "vqa_rad"),
        ("SLAKE images", "images", "slake"),
        ("PathVQA images", "images", "pathvqa"),
        ("PathVQA pairs", "qa_pairs", "pathvqa"),
    ):
        parts = [int(rows.at[row, name]) for name in rows.columns if name.startswith(prefix)]
        same = sum(parts) == IN_TEXT[label]
        yield Finding(
            "data set counts",
            f"Appendix A.3 and Table 8, {label}",
            f"{IN_TEXT[label]} in the text",
            f"{' + '.join(map(str, parts))} = {sum(parts)}",
            AGREES if same else DIFFERS,
            "The splits add up to the text." if same else "The splits of the table do not add up to the text.",
        )


def equal_cells() -> Iterator[Finding]:
    """Table 2: equal cells in one row or one column of different benchmarks or models."""
    rows = table("table2").set_index("model")
    for model, row in rows.iterrows():
        for one, other in combinations(row.dropna().index, 2):
            if row[one] == row[other]:
                yield _equal(f"Table 2, {model}: {one} and {other}", row[one])
    for column in rows.columns:
        for one, other in combinations(rows[column].dropna().index, 2):
            if rows.at[one, column] == rows.at[other, column]:
                yield _equal(f"Table 2, {column}: {one} and {other}", rows.at[one, column])


def _equal(where: str, value: float) -> Finding:
    reading = "The same two decimals in two cells. It may be so; the tables cannot tell."
    return Finding("equal cells", where, f"{value:.2f}", f"{value:.2f} = {value:.2f}", REMARK, reading)
