"""The figures of single studies: training stages, LoRA, samplers, caches, and a benchmark by groups of questions.

Frames in, matplotlib figures out, as in `medv.companion.figures.plots`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from medv.companion.figures import plots
from medv.companion.figures.plots import INK, MUTED, PALETTE, draw_bars, draw_image, draw_lines, drawing, spread, theme
from medv.companion.figures.words import FALSE, TRUE
from medv.data.example import Example, load_image

COSTS = {
    "trainable_parameters": "trained\nparameters",
    "peak_memory_bytes": "peak\nmemory",
    "step_seconds": "step\ntime",
    "checkpoint_bytes": "checkpoint\nsize",
}
QUALITY_AXES = {
    "log_likelihood": "log-likelihood (nats a token)",
    "f1": "F1 of {unit} (%)",
    "adjacent_duplicates": "adjacent duplicates (%)",
}
COORDINATES = (("x", "error"), ("y", "repeated"))  # of `length_figure`
CACHE_AXES = {
    "identity": ("tokens as without a cache (%)", 100),
    "first_divergence": ("first differing forward", 1),
    "kl": ("KL(exact || cached), nats", 1),
}


def stage_figure(
    losses: pd.DataFrame, findings: pd.DataFrame, title: str, *, unit: str = "facts"
) -> tuple[Figure, pd.DataFrame]:
    """Left: loss against step. Right: precision, recall and F1 of the texts of several systems with their intervals.

    losses: step, loss, split. findings: system, metric, value, low, high (percent). unit: of these scores, for the title.
    Returns the figure and what it draws.
    """
    styles = {}
    for place, system in enumerate(dict.fromkeys(findings["system"])):
        control = "wrong image" in system
        styles[system] = {"color": "#d5d8dc" if control else PALETTE[place // 2], "hatch": "///" if control else None}
        styles[system]["edgecolor"] = "white"
    with drawing(10.5, 4.0, ncols=2, gridspec_kw={"width_ratios": [1, 1.15]}) as (fig, (left, right)):
        draw_lines(left, losses, "step", "loss", "split")
        left.set(title=title, xlabel="optimizer step", ylabel="loss")
        if losses.empty:
            left.text(0.5, 0.5, "no losses: trained elsewhere", transform=left.transAxes, ha="center")
        else:
            left.legend()
        draw_bars(right, findings.replace({"metric": {"f1": "F1"}}), styles, numbers=False)
        right.set(title=f"{unit.capitalize()} in the text", ylabel="score (%)", ylim=(0, 105))
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return fig, pd.concat([losses.assign(panel="loss"), findings.assign(panel="findings")], ignore_index=True)


def answer_figure(chosen: pd.DataFrame, examples: Sequence[Example], title: str) -> Figure:
    """Images with question, answer (green right, red wrong) and reference. chosen: id, question, reference, answer, right."""
    by_id = {example.id: example for example in examples}
    columns, rows = 5, -(-len(chosen) // 5)
    with drawing(2.25 * columns, 3.2 * rows, title, nrows=rows, ncols=columns, squeeze=False) as (fig, axes):
        fig.get_layout_engine().set(rect=(0, 0.05, 1, 0.95), hspace=0.12)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, row in zip(axes.flat, chosen.itertuples(), strict=False):
            draw_image(ax, load_image(by_id[row.id]))
            ax.set_title(textwrap.fill(row.question, 30), fontsize=8, weight="normal", loc="left", parse_math=False)
            answer = (row.answer or "(nothing)") + ("" if row.right else f"  [truth: {row.reference}]")
            style = {"transform": ax.transAxes, "va": "top", "fontsize": 8, "weight": "bold", "parse_math": False}
            ax.text(0, -0.04, textwrap.fill(answer, 30), color=TRUE if row.right else FALSE, **style)
    return fig


def lora_figure(curve: pd.DataFrame, cost: pd.DataFrame, levels: Mapping[str, float]) -> Figure:
    """Left: score against training questions with 95 % intervals. Right: the cost of each arm in percent of the arm "full".

    curve: arm, size, value, low, high (percent). cost: arm and the columns of COSTS. levels: dashed lines, by name.
    """
    arms = list(cost["arm"])
    with drawing(11.5, 4.3, ncols=2, gridspec_kw={"width_ratios": [1.1, 1]}) as (fig, (left, right)):
        for place, arm in enumerate(arms):
            rows = curve[curve["arm"] == arm].sort_values("size")
            at = rows["size"] * 1.06 ** (place - (len(arms) - 1) / 2)  # side by side, so that intervals are seen
            style = {"color": PALETTE[place], "marker": "os^Dvp"[place % 6], "ms": 5, "lw": 1.6, "capsize": 3}
            left.errorbar(at, rows["value"], yerr=spread(rows), label=arm, **style)
        for (name, value), line in zip(levels.items(), ("--", ":", "-."), strict=False):
            left.axhline(value, color=MUTED, lw=1.2, ls=line, label=name)
        sizes = sorted(set(curve["size"]))
        left.set(xscale="log", xlabel="training questions", ylabel="score (%)", title="Test score after stage 3")
        left.set_xticks(sizes, [str(size) for size in sizes])
        left.xaxis.set_minor_locator(NullLocator())
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        costs = cost.set_index("arm")[list(COSTS)].rename(columns=COSTS)
        shares = (100 * costs / costs.loc["full"]).reset_index().melt("arm", var_name="metric")
        draw_bars(right, shares.rename(columns={"arm": "system"}))
        right.set(title="Cost of a training", ylabel="percent of full fine-tuning")
        right.margins(y=0.1)  # room for the numbers
    return fig


def pareto_figure(points: pd.DataFrame, title: str, *, unit: str = "facts") -> Figure:
    """A column for each judge, quality above repetition, against forwards; the front is drawn through.

    Strategies that used the same number of forwards are drawn side by side.

    points: judge, strategy ("schedule" or "schedule + filter"), metric, forwards, value, low, high (95 %), front. unit: of F1.
    """
    strategies = list(dict.fromkeys(points["strategy"]))
    schedules = list(dict.fromkeys(strategy.partition(" + ")[0] for strategy in strategies))
    colors = dict(zip(reversed(schedules), PALETTE * 2, strict=False))  # the last, our own, in the first color
    beside = {strategy: 1.01 ** (place - (len(strategies) - 1) / 2) for place, strategy in enumerate(strategies)}
    judges = list(dict.fromkeys(points["judge"]))
    with drawing(4.4 * len(judges) + 2.0, 7.0, title, nrows=2, ncols=len(judges), squeeze=False) as (fig, axes):
        for column, judge in zip(axes.T, judges, strict=True):
            mine = points[points["judge"] == judge]
            for ax, (metric, part) in zip(column, mine.groupby("metric", sort=False), strict=True):
                best = part[part["front"]].sort_values("forwards")
                ax.plot(best["forwards"] * best["strategy"].map(beside), best["value"], color=INK, lw=1, zorder=1)
                for row in part.itertuples():
                    schedule, filtered, _ = row.strategy.partition(" + ")
                    color, x = colors[schedule], row.forwards * beside[row.strategy]
                    ax.plot([x, x], [row.low, row.high], color=color, lw=1.0, alpha=0.45, zorder=2)
                    style = {"marker": "s" if filtered else "o", "mfc": color if filtered else "white", "mec": color}
                    ax.plot(x, row.value, ms=4.5, zorder=3, **style)
                ax.set(xlabel="forwards a text", ylabel=QUALITY_AXES[metric].format(unit=unit), xscale="log")
                ticks = sorted(part["steps"].unique())
                ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
                ax.set_xticks([], minor=True)
            column[0].set_title(f"{judge}, n = {int(mine['n'].max())}")
        handles = [Line2D([], [], color=colors[s], marker="o", ls="", label=s) for s in schedules]
        handles += [
            Line2D([], [], color=MUTED, marker="o", mfc="white", ls="", label="without filter"),
            Line2D([], [], color=MUTED, marker="s", ls="", label="with duplicate veto"),
            Line2D([], [], color=INK, lw=1, label="front"),
        ]
        fig.legend(handles=handles, loc="outside right center")
    return fig


def cache_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Token identity, first divergence and KL against the refresh interval, a line for each kind of cache.

    frame: kind, interval (missing = at block starts alone), identity (share), first_divergence (forwards), kl (nats).
    """
    labels = ["block\nstart" if pd.isna(value) else str(value) for value in frame["interval"]]
    places = list(dict.fromkeys(labels))
    lines = frame.assign(place=[places.index(label) for label in labels], kind=frame["kind"] + " cache")
    with drawing(11.5, 3.6, title, ncols=3) as (fig, axes):
        for ax, (name, (label, scale)) in zip(axes, CACHE_AXES.items(), strict=True):
            draw_lines(ax, lines.assign(value=scale * lines[name]), "place", hue="kind")
            ax.set_xticks(range(len(places)), places)
            ax.set(xlabel="forwards between refreshes", ylabel=label)
            ax.margins(y=0.12)
        axes[0].legend()
    return fig


def radar(frame: pd.DataFrame, title: str = "", *, labels: Mapping[str, str] | None = None) -> Figure:
    """A polygon per system. frame: system, group, value (percent); labels: group -> its text. ValueError below three groups."""
    groups = list(dict.fromkeys(frame["group"]))
    if len(groups) < 3:
        raise ValueError(f"a radar needs at least three groups, but there are {len(groups)}: {', '.join(groups)}")
    angles = np.linspace(0, 2 * np.pi, len(groups), endpoint=False)
    with theme():
        fig = Figure(figsize=(8.2, 4.6), layout="constrained")
        ax = fig.add_subplot(projection="polar", theta_offset=np.pi / 2, theta_direction=-1)
        for place, (system, part) in enumerate(frame.groupby("system", sort=False)):
            values = part.set_index("group")["value"].reindex(groups).to_numpy(float)
            style = {"color": PALETTE[place % len(PALETTE)], "marker": "osD^vPX"[place % 7], "ms": 4, "lw": 1.7}
            closed = np.append(angles, angles[0]), np.append(values, values[0])
            ax.plot(*closed, ("-", "--", ":", "-.")[place % 4], label=system, **style)
        ax.set(ylim=(0, 100), yticks=[25, 50, 75, 100])
        ax.set_xticks(angles, [(labels or {}).get(group, group) for group in groups])
        ax.tick_params(axis="x", pad=12)
        ax.set_title(title, pad=22)
        fig.legend(loc="outside right center")
    return fig


def group_scores(frame: pd.DataFrame, title: str = "", *, labels: Mapping[str, str] | None = None) -> Figure:
    """The groups of a benchmark as a `radar`, or as bars with the overall score where there are fewer than three.

    frame: system, group (one of them "overall"), value, low, high (percent).
    """
    groups = frame[frame["group"] != "overall"]
    if groups["group"].nunique() > 2:
        return radar(groups, title, labels=labels)
    return plots.accuracy_bars(frame.assign(metric=frame["group"].replace(labels or {})), title)


def reliability_diagram(bins: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy against confidence, a row of panels per unit, before and after the fit; the diagonal is perfect calibration.

    bins: unit, steps, fit, confidence, accuracy (percent), n; the area of a point grows with n. Bins of fewer than 10 are not
    drawn.
    """
    units, fits = list(dict.fromkeys(bins["unit"])), list(dict.fromkeys(bins["fit"]))
    with drawing(3.2 * len(fits) + 1, 3.0 * len(units), title, nrows=len(units), ncols=len(fits), squeeze=False) as (fig, axes):
        for (unit, fit), ax in zip(product(units, fits), axes.flat, strict=True):
            part = bins[(bins["unit"] == unit) & (bins["fit"] == fit) & (bins["n"] >= 10)]
            ax.plot([0, 100], [0, 100], color=MUTED, lw=1, ls="--", zorder=0)
            for place, (steps, rows) in enumerate(part.groupby("steps", sort=False)):
                color = PALETTE[place % len(PALETTE)]
                ax.plot(rows["confidence"], rows["accuracy"], color=color, lw=1.3, label=f"Z = {steps}")
                ax.scatter(rows["confidence"], rows["accuracy"], 8 + 100 * rows["n"] / rows["n"].sum(), color=color)
            ax.set(title=f"{unit}, {fit}", xlabel="confidence (%)", ylabel="right (%)", xlim=(-3, 103), ylim=(-3, 103))
        handles, labels = axes.flat[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center", title="forwards")
    return fig


def length_figure(points: pd.DataFrame, title: str, *, asked: float, level: float) -> Figure:
    """Repeated words against the median length error with 95 % intervals: a color per way, a marker per arm.

    points: arm, way, and error, repeated (percent) with _low and _high. asked: the length error that is asked for; level: the
    repeated words of the references.
    """
    ways, arms = list(dict.fromkeys(points["way"])), list(dict.fromkeys(points["arm"]))
    with drawing(8.0, 4.2) as (fig, ax):
        for row in points.to_dict("records"):
            color, marker = PALETTE[ways.index(row["way"])], "os^"[arms.index(row["arm"])]
            bars = {f"{axis}err": [[row[n] - row[f"{n}_low"]], [row[f"{n}_high"] - row[n]]] for axis, n in COORDINATES}
            ax.errorbar(row["error"], row["repeated"], **bars, color=color, marker=marker, ms=7, capsize=3, lw=1.2)
        ax.axvline(asked, color=MUTED, lw=1, ls="--")
        ax.axhline(level, color=MUTED, lw=1, ls=":")
        ax.set(title=title, xscale="log", xlabel="median |words - reference| (%)", ylabel="repeated words (%)", ylim=(0, None))
        ticks = [tick for tick in (5, 10, 15, 20, 30, 50, 100, 200, 500) if tick <= max(20, 1.5 * points["error"].max())]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        handles = [Line2D([], [], color=PALETTE[place], marker="o", ls="", label=way) for place, way in enumerate(ways)]
        handles += [Line2D([], [], color=MUTED, marker="os^"[place], ls="", label=arm) for place, arm in enumerate(arms)]
        handles.append(Line2D([], [], color=MUTED, lw=1, ls="--", label=f"{asked:g} %"))
        handles.append(Line2D([], [], color=MUTED, lw=1, ls=":", label="the references repeat"))
        fig.legend(handles=handles, loc="outside right center")
    return fig


def repetition_front(points: pd.DataFrame, metrics: Mapping[str, str], title: str, *, score: str, best: str) -> Figure:
    """Changes of score and repetition at equal forwards, a row of panels per metric and a panel per number of forwards.

    points: way, steps, and for score and each metric `_gap`, `_low`, `_high`: the paired difference from the baseline, which
    has none and is the origin. best: the way drawn as a star.
    """
    compared = points[points["score_gap"].notna() | points["repeated_share_gap"].notna()]
    ways, counts = list(dict.fromkeys(compared["way"])), sorted(compared["steps"].unique())
    shape = {"nrows": len(metrics), "ncols": len(counts), "squeeze": False, "sharey": True, "sharex": "row"}
    with drawing(3.3 * len(counts) + 1.5, 3.0 * len(metrics), title, **shape) as (fig, axes):
        for (metric, steps), ax in zip(product(metrics, counts), axes.flat, strict=True):
            ax.axhline(0, color=MUTED, lw=1, ls="--")
            ax.axvline(0, color=MUTED, lw=1, ls="--")
            for row in compared[compared["steps"] == steps].to_dict("records"):
                x, y = row[f"{metric}_gap"], row["score_gap"]
                across = [[x - row[f"{metric}_low"]], [row[f"{metric}_high"] - x]]
                up = [[y - row["score_low"]], [row["score_high"] - y]]
                color, star = PALETTE[ways.index(row["way"]) % len(PALETTE)], row["way"] == best
                style = {"color": color, "marker": "*" if star else "o", "ms": 13 if star else 6, "elinewidth": 1}
                ax.errorbar(x, y, yerr=up, xerr=across, ls="", label=row["way"], **style)
            ax.set(title=f"Z = {steps:.0f}", xlabel=f"{metrics[metric]}, points")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"{score}, points")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center")
    return fig


def hidden_word_bars(bars: pd.DataFrame, title: str = "", *, pale: str) -> Figure:
    """Percent of hidden words that are right: a group per kind, a bar per system. bars: metric, system, value, low, high.

    pale: what ends the name of a control; it has the color of the system that it controls, pale.
    """
    systems = list(dict.fromkeys(bars["system"]))
    colors = dict(zip([name for name in systems if not name.endswith(pale)], PALETTE, strict=False))
    styles = {
        name: {"color": colors[name.removesuffix(pale)], "alpha": 0.35 if name.endswith(pale) else 1.0} for name in systems
    }
    with drawing(2.0 + 2.1 * bars["metric"].nunique(), 4.2) as (fig, ax):
        plots.draw_bars(ax, bars, styles, numbers=False)
        ax.set(title=title, ylabel="right (%)", ylim=(0, 105), yticks=range(0, 101, 20))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
        sns.despine(fig)
    return fig


def effects_figure(table: pd.DataFrame, title: str) -> Figure:
    """Effects over several runs, a row each: the mean over runs with its 95 % interval, and the value of each run as a tick.

    table: notebook, effect, unit, value, low, high, status, and a column "seed <k>" of texts "value [low, high]" for each run.
    The axis is linear to one unit, then logarithmic.
    """
    rows = table[table["value"].notna()].reset_index(drop=True)
    runs = [column for column in rows if column.startswith("seed ")]
    names = rows["effect"].where(rows["unit"] == "points", rows["effect"] + " (" + rows["unit"] + ")")
    groups = rows["notebook"].ne(rows["notebook"].shift())
    with drawing(10.5, 1.2 + 0.2 * len(rows)) as (fig, ax):
        for place, row in rows.iterrows():
            shown = str(row["status"]).startswith("shown")
            color = PALETTE[0] if shown else PALETTE[1]
            ax.plot([row["low"], row["high"]], [place, place], color=color, lw=1.2)
            ax.plot(row["value"], place, marker="o" if shown else "s", ms=5, color=color, mfc=color if shown else "white")
            each = [float(str(row[run]).split(" ")[0]) for run in runs if str(row[run])[:1] in "+-0123456789"]
            ax.plot(each, [place] * len(each), ls="", marker="|", ms=8, color=INK, mew=0.8)
        for place in rows.index[groups][1:]:
            ax.axhline(place - 0.5, color="#cfcfcf", lw=0.8)
        ax.axvline(0, color=MUTED, lw=1, ls="--")
        ax.set_xscale("symlog", linthresh=1)
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="difference, in points unless stated", title=title)
        ax.set_yticks(
            rows.index, [textwrap.shorten(name, 84, placeholder=" ...") for name in names], fontsize=7.5, parse_math=False
        )
        ax.grid(axis="y", visible=False)
        handles = [Line2D([], [], color=PALETTE[0], marker="o", label="shown: the same in every run, and corrected")]
        handles += [Line2D([], [], color=PALETTE[1], marker="s", mfc="white", label="open")]
        handles += [Line2D([], [], color=INK, marker="|", ls="", label=f"one run ({len(runs)})")]
        fig.legend(handles=handles, loc="outside lower right", ncols=3)
    return fig
