"""The figures of the sampling notebooks: quality against forwards, and how far caches lead astray.

Frames in, figures out, as in `medv.companion.figures.plots`. Nothing is sampled or scored here.
"""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medv.companion.figures.plots import INK, MUTED, PALETTE, new_figure, theme

AXES = {
    "log_likelihood": "log-likelihood (nats a token)",
    "f1": "F1 of stated findings (%)",
    "adjacent_duplicates": "adjacent duplicates (%)",
}
CACHE_AXES = {
    "identity": ("tokens as without a cache (%)", 100),
    "first_divergence": ("first differing forward", 1),
    "kl": ("KL(exact || cached), nats", 1),
}


def pareto_figure(points: pd.DataFrame, title: str) -> Figure:
    """A column for each judge, quality above repetition, against forwards; the front is drawn through.

    Strategies that used the same number of forwards are drawn side by side.

    points: judge, strategy ("schedule" or "schedule + filter"), metric, forwards, value, low, high (95 %), front.
    """
    judges, schedules = list(dict.fromkeys(points["judge"])), list(dict.fromkeys(points["strategy"].map(_schedule)))
    colors = dict(zip(reversed(schedules), PALETTE * 2, strict=False))  # the last, our own, in the first color
    beside = dict(zip(dict.fromkeys(points["strategy"]), _spread(points["strategy"].nunique()), strict=True))
    with theme():
        fig, axes = new_figure(4.4 * len(judges) + 2.0, 7.0, nrows=2, ncols=len(judges), squeeze=False)
        for column, judge in zip(axes.T, judges, strict=True):
            mine = points[points["judge"] == judge]
            for ax, (metric, part) in zip(column, mine.groupby("metric", sort=False), strict=True):
                _scatter(ax, part, colors, beside)
                ax.set(xlabel="forwards a text", ylabel=AXES[metric], xscale="log")
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
        fig.suptitle(title, fontsize=11, fontweight="bold")
    return fig


def _schedule(strategy: str) -> str:
    return strategy.partition(" + ")[0]


def _spread(count: int) -> list[float]:
    """Factors around 1 that set so many points with the same number of forwards beside each other."""
    return [1.01 ** (place - (count - 1) / 2) for place in range(count)]


def _scatter(ax, part: pd.DataFrame, colors: dict, beside: dict) -> None:
    best = part[part["front"]].sort_values("forwards")
    ax.plot(best["forwards"] * best["strategy"].map(beside), best["value"], color=INK, lw=1, zorder=1)
    for row in part.itertuples():
        color, bare = colors[_schedule(row.strategy)], " + " not in row.strategy
        x = row.forwards * beside[row.strategy]
        ax.plot([x, x], [row.low, row.high], color=color, lw=1.0, alpha=0.45, zorder=2)
        style = {"marker": "o" if bare else "s", "mfc": "white" if bare else color, "mec": color, "ms": 4.5}
        ax.plot(x, row.value, zorder=3, **style)


def cache_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Token identity, first divergence and KL against the refresh interval, a line for each kind of cache.

    frame: kind, interval (missing = at block starts alone), identity (share), first_divergence (forwards), kl (nats).
    """
    labels = ["block\nstart" if pd.isna(value) else str(value) for value in frame["interval"]]
    places = list(dict.fromkeys(labels))
    with theme():
        fig, axes = new_figure(11.5, 3.6, ncols=3)
        for ax, (name, (label, scale)) in zip(axes, CACHE_AXES.items(), strict=True):
            for color, (kind, rows) in zip(PALETTE, frame.groupby("kind", sort=False), strict=False):
                at = [places.index(labels[row]) for row in rows.index]
                ax.plot(at, scale * rows[name], color=color, marker="o", ms=4, lw=1.8, label=f"{kind} cache")
            ax.set_xticks(range(len(places)), places)
            ax.set(xlabel="forwards between refreshes", ylabel=label)
            ax.margins(y=0.12)
        axes[0].legend()
        fig.suptitle(title, fontsize=11, fontweight="bold")
    return fig
