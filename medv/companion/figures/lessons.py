"""The figures of the tutorials: a training stage at a glance, and answers beside their images and beside each other.

Frames in, figures out, as in `figures.plots`, whose parts these combine. Nothing is trained, asked or scored here.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medv.companion.figures.answers import answers_side_by_side
from medv.companion.figures.plots import INK, PALETTE, new_figure, theme
from medv.data.example import Example, load_image, picture_of

GOOD, BAD = "#0b6b3a", "#b3261e"
METRIC_NAMES = {
    "closed_accuracy": "closed accuracy",
    "closed_strict_accuracy": "closed accuracy, strict",
    "open_recall": "open recall",
}


def stage_figure(losses: pd.DataFrame, findings: pd.DataFrame, title: str) -> tuple[Figure, pd.DataFrame]:
    """Left: loss against step. Right: findings precision, recall and F1 of several systems with their intervals.

    losses: step, loss, split. findings: system, metric, value, low, high (percent). Returns the figure and what it draws.
    """
    systems, metrics = list(dict.fromkeys(findings["system"])), list(dict.fromkeys(findings["metric"]))
    width = 0.8 / len(systems)
    with theme():
        fig, (left, right) = new_figure(10.5, 4.0, ncols=2, gridspec_kw={"width_ratios": [1, 1.15]})
        for color, (split, part) in zip(PALETTE, losses.groupby("split", sort=False), strict=False):
            left.plot(part["step"], part["loss"], color=color, lw=1.8, label=split, marker="o" if len(part) < 15 else None)
        left.set(title=title, xlabel="optimizer step", ylabel="loss")
        if losses.empty:
            left.text(0.5, 0.5, "no losses: trained elsewhere", transform=left.transAxes, ha="center")
        else:
            left.legend()
        for place, system in enumerate(systems):
            rows = findings[findings["system"] == system].set_index("metric").reindex(metrics)
            at = np.arange(len(metrics)) + (place - (len(systems) - 1) / 2) * width
            spread = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["value"].to_numpy(float))
            hatch = "///" if "wrong image" in system else None
            color = PALETTE[place // 2] if hatch is None else "#d5d8dc"
            style = {"color": color, "label": system, "hatch": hatch, "edgecolor": "white"}
            right.bar(at, rows["value"], width * 0.92, yerr=spread, error_kw={"ecolor": INK, "capsize": 2}, **style)
        right.set_xticks(range(len(metrics)), [{"f1": "F1"}.get(metric, metric) for metric in metrics])
        right.set(title="Facts in the text", ylabel="score (%)", ylim=(0, 105))
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
        right.grid(False, axis="x")
    frames = [losses.assign(panel="loss"), findings.assign(panel="findings")]
    return fig, pd.concat(frames, ignore_index=True)


def control_bars(summary: pd.DataFrame, test: str) -> pd.DataFrame:
    """The rows of `medv.companion.studies.training_stages.scores` for one test set, as `figures.accuracy_bars` wants them."""
    rows = summary[(summary["test"] == test) & summary["metric"].isin(METRIC_NAMES)]
    rows = rows.sort_values("metric", kind="stable", key=lambda column: column.map(list(METRIC_NAMES).index))
    return rows.assign(metric=rows["metric"].map(METRIC_NAMES)).rename(columns={"condition": "system"})


def chosen_answers(items: pd.DataFrame, test: str, *, condition: str = "after stage 3", count: int = 10) -> pd.DataFrame:
    """Answers of the first seed to look at: as many wrong as right where there are enough, of many kinds, in test order.

    Columns: id, kind, question, reference, answer, right (closed: strictly; open: all words of the reference).
    """
    rows = items[(items["test"] == test) & (items["condition"] == condition) & (items["seed"] == items["seed"].min())]
    rows = rows.assign(right=(rows["closed_strict_accuracy"].fillna(rows["open_set_recall"]) == 100))
    nth = rows.groupby(["right", rows["kind"].fillna("any"), "answer_type"]).cumcount()
    rows = rows.assign(nth=nth).sort_values(["nth", "id"], kind="stable")
    wrong = rows[~rows["right"]].head(count // 2)
    right = rows[rows["right"]].head(count - len(wrong))
    wrong = rows[~rows["right"]].head(count - len(right))
    columns = ["id", "kind", "question", "reference", "answer", "right"]
    return pd.concat([right, wrong])[columns].reset_index(drop=True)


def answer_figure(chosen: pd.DataFrame, examples: Sequence[Example], title: str, *, columns: int = 5) -> Figure:
    """Each image with its question, the answer (green right, red wrong) and, where wrong, the reference."""
    by_id = {example.id: example for example in examples}
    rows = -(-len(chosen) // columns)
    with theme():
        fig, axes = new_figure(2.25 * columns, 3.2 * rows, nrows=rows, ncols=columns, squeeze=False)
        fig.get_layout_engine().set(rect=(0, 0.05, 1, 0.95), hspace=0.12)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, row in zip(axes.flat, chosen.itertuples(), strict=False):
            ax.imshow(np.asarray(load_image(by_id[row.id])), interpolation="nearest")
            ax.set_title(textwrap.fill(row.question, 30), fontsize=8, weight="normal", loc="left", parse_math=False)
            said = (row.answer or "(nothing)") + ("" if row.right else f"  [truth: {row.reference}]")
            style = {"transform": ax.transAxes, "va": "top", "fontsize": 8, "weight": "bold", "parse_math": False}
            ax.text(0, -0.04, textwrap.fill(said, 30), color=GOOD if row.right else BAD, **style)
        fig.suptitle(title, fontsize=11, fontweight="bold")
    return fig


def setting_answers(
    items: pd.DataFrame, settings: pd.DataFrame, group: str, example: Example, title: str
) -> tuple[Figure, pd.DataFrame]:
    """One image as the settings of a group of Table 5 describe it. items: as `medv.companion.studies.generation.ask_all` gives.

    Returns the figure and its rows: setting, question, text, score, words, repeated_share.
    """
    wanted = settings[settings["group"] == group]["setting"]
    rows = items[items["id"] == example.id].set_index("setting").loc[list(wanted)].reset_index()
    rows = rows[["setting", "question", "text", "score", "words", "repeated_share"]]
    return compared_answers(rows.rename(columns={"setting": "name"}), example, title), rows


def compared_answers(rows: pd.DataFrame, example: Example, title: str, *, per_row: int = 2) -> Figure:
    """Answers to one request side by side. rows: name, text, score (percent or empty), words."""
    scene = example.meta.get("scene")
    columns = [
        (f"{r.name}: {r.words} words" + ("" if np.isnan(r.score) else f", facts {r.score:.0f}"), r.text, scene)
        for r in rows.itertuples(index=False)
    ]
    image = picture_of(example)
    return answers_side_by_side(columns, title, image=image, question=example.question, per_row=per_row, characters=58)
