"""Loss curves over a band of healthy trainings (notebook 15, `medv compare-loss`). Frames in, matplotlib figures out."""

import textwrap

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from medv.companion.figures.plots import INK, PALETTE, drawing
from medv.companion.figures.words import FALSE


def band_figure(band: pd.DataFrame, title: str = "") -> Figure:
    """A panel per normalization: median and band of each way to draw t against the step.

    band: normalization, times, step, median, low, high (nats).
    """
    names = list(dict.fromkeys(band["normalization"]))
    rows = -(-len(names) // 2)
    with drawing(9.0, 2.9 * rows, title, nrows=rows, ncols=2, squeeze=False, sharex=True) as (fig, axes):
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        for name, ax in zip(names, axes.flat, strict=False):
            for place, (times, rows) in enumerate(band[band["normalization"] == name].groupby("times", sort=False)):
                style = {"color": PALETTE[1 - place], "hatch": ("//", None)[place], "alpha": 0.3, "lw": 0.8}
                ax.fill_between(rows["step"], rows["low"], rows["high"], **style)
                ax.plot(rows["step"], rows["median"], color=PALETTE[1 - place], lw=1.7, ls="-" if place else "--", label=times)
            ax.set(title=f'normalization "{name}"', ylim=(0, None))
        for ax in axes[-1]:
            ax.set_xlabel("optimizer step")
        for ax in axes[:, 0]:
            ax.set_ylabel("loss (nats)")
        axes.flat[0].legend(title="t is drawn", loc="lower left")
        sns.despine(fig)
    return fig


def own_loss_figure(band: pd.DataFrame, own: pd.DataFrame, title: str = "", *, ylabel: str) -> Figure:
    """A loss over a band: points outside the band are red crosses.

    band: share (of the run), median, low, high. own: share, value, where ("above", "below" or "inside").
    """
    with drawing(7.0, 4.0) as (fig, ax):
        ax.fill_between(100 * band["share"], band["low"], band["high"], color=PALETTE[0], alpha=0.3, lw=0, label="band")
        ax.plot(100 * band["share"], band["median"], color=PALETTE[0], lw=1.5, ls="--", label="median of the band")
        ax.plot(100 * own["share"], own["value"], color=INK, lw=1.2, marker="o", ms=3.5, label="your loss")
        outside = own[own["where"] != "inside"]
        if len(outside):
            style = {"color": FALSE, "marker": "X", "s": 60, "zorder": 3, "label": "outside the band"}
            ax.scatter(100 * outside["share"], outside["value"], **style)
        ax.set(title=title, xlabel="share of the run (%)", ylabel=textwrap.fill(ylabel, 40), xlim=(0, 102), ylim=(0, None))
        ax.legend()
        sns.despine(fig)
    return fig
