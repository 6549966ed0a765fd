"""The look of every figure and the plots that the notebooks share.

Frames in, matplotlib figures out: nothing here trains, samples or reads a file. Colors are the color-blind palette on an
opaque white ground, so that a figure reads the same in print and on a dark screen. Saved files carry no date and no random
ids: the same data gives the same bytes.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from medv.artifacts import atomic_file
from medv.companion.figures.tables import cells
from medv.intervals import NOT_MEASURED

PALETTE = sns.color_palette("colorblind").as_hex()
INK, MUTED = "#1b1b1b", "#5f6368"
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "medv",
    "svg.fonttype": "path",
}


@contextmanager
def theme() -> Iterator[None]:
    """Draw inside this context to get the common look; the caller's own settings come back at the end."""
    settings = sns.axes_style("whitegrid", {"grid.color": "#e3e3e3", "axes.edgecolor": "#8a8a8a"})
    with mpl.rc_context({**settings, **STYLE, "axes.prop_cycle": mpl.cycler(color=PALETTE)}):
        yield


def new_figure(width: float = 7.0, height: float = 4.0, **subplots: Any) -> tuple[Figure, Any]:
    """A figure (inches) and its axes, outside pyplot's list of open figures; `subplots` as in `Figure.subplots`."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(**subplots)


@contextmanager
def drawing(width: float, height: float, title: str | None = None, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """`new_figure` to draw on inside this context, in the common look; at its end a title above all axes, unless it is None."""
    with theme():
        fig, axes = new_figure(width, height, **subplots)
        yield fig, axes
        if title is not None:
            fig.suptitle(title, fontsize=11, fontweight="bold")


def footer(fig: Figure, text: str) -> None:
    """Write a small grey line under the figure, wrapped to its width; a second call replaces the first."""
    for old in [artist for artist in fig.texts if artist.get_gid() == "footer"]:
        old.remove()
    wrapped = textwrap.fill(text, max(40, int(fig.get_figwidth() * 15)))
    fig.text(0.01, -0.01, wrapped, fontsize=7.5, ha="left", va="top", gid="footer", color=MUTED, parse_math=False)


def save(fig: Figure, stem: str | Path, dpi: int = 160) -> tuple[Path, ...]:
    """Write `stem`.png and `stem`.svg atomically, the same bytes for the same figure; returns both paths.

    A `$` in a name or an answer is a dollar sign: only the numbers that matplotlib writes at an axis are formulas.
    """
    stem, paths = Path(stem), []
    for text in fig.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    metadata = {"png": {"Software": None}, "svg": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
    for kind, nothing in metadata.items():
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        with mpl.rc_context({"svg.hashsalt": "medv", "svg.fonttype": "path"}), atomic_file(paths[-1]) as partial:
            fig.savefig(partial, format=kind, dpi=dpi, bbox_inches="tight", facecolor="white", metadata=nothing)
    return tuple(paths)


# --- Parts of figures ---


def draw_image(ax: Axes, image: Any) -> None:
    """An image (PIL or H x W [x 3] uint8), its pixels hard, without axes."""
    ax.imshow(np.asarray(image), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    ax.set_axis_off()


def spread(rows: pd.DataFrame, y: str = "value") -> np.ndarray:
    """The lengths of error bars [2, N] of rows with `y`, low and high."""
    return np.abs(rows[["low", "high"]].to_numpy(float).T - rows[y].to_numpy(float))


def draw_lines(ax: Axes, frame: pd.DataFrame, x: str, y: str = "value", hue: str | None = None) -> None:
    """A line of `y` against `x` for each `hue`, with error bars from the columns low and high if there are any."""
    missing = [name for name in (x, y, hue) if name is not None and name not in frame.columns]
    if missing:
        raise ValueError(f"the frame lacks {', '.join(missing)}: it has {', '.join(map(str, frame.columns))}")
    groups = [(None, frame)] if hue is None else frame.groupby(hue, sort=False)
    for place, (name, rows) in enumerate(groups):
        rows = rows.sort_values(x, kind="stable")
        style = {"color": PALETTE[place % len(PALETTE)], "lw": 1.7, "ms": 4, "marker": "o" if len(rows) <= 20 else None}
        bars = spread(rows, y) if {"low", "high"} <= set(rows.columns) else None
        ax.errorbar(rows[x], rows[y], yerr=bars, capsize=3, label=name if name is None else str(name), **style)


def draw_bars(
    ax: Axes, frame: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]] | None = None, *, numbers: bool = True
) -> None:
    """Grouped bars: a group for each metric, in it a bar for each system, with an interval where low and high are given.

    frame: metric, system, value, and optionally low and high, which may be empty. styles: options of `Axes.bar` by system.
    numbers: write each value above its bar.
    """
    metrics, systems = list(dict.fromkeys(frame["metric"])), list(dict.fromkeys(frame["system"]))
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        rows = frame[frame["system"] == system].set_index("metric").reindex(metrics)
        at = np.arange(len(metrics)) + (place - (len(systems) - 1) / 2) * width
        style = {"color": PALETTE[place % len(PALETTE)], "label": system} | dict((styles or {}).get(system, {}))
        around = np.nan_to_num(spread(rows)) if "low" in rows else None
        whiskers = {"ecolor": INK, "elinewidth": 1.2, "capsize": 3}
        bars = ax.bar(at, rows["value"], width * 0.92, yerr=around, error_kw=whiskers, **style)
        if numbers:
            ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    ax.set_xticks(range(len(metrics)), metrics)
    ax.grid(False, axis="x")


# --- Figures ---


def accuracy_bars(frame: pd.DataFrame, title: str = "") -> Figure:
    """`draw_bars` of percentages as a figure: a model beside its controls. frame: metric, system, value, low, high."""
    with drawing(1.8 + 2.6 * frame["metric"].nunique(), 3.8) as (fig, ax):
        draw_bars(ax, frame)
        ax.set(title=title, ylabel="score (%)", ylim=(0, 112), yticks=range(0, 101, 20))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(4, frame["system"].nunique()))
        sns.despine(fig)
    return fig


def gallery(images: Sequence[Any], captions: Sequence[str], title: str = "", *, wrap: int = 26) -> Figure:
    """A grid of images (PIL or H x W [x 3] arrays), five in a row, with a caption under each, wrapped to `wrap` characters."""
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions: give one caption for each, and at least one")
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    texts = [textwrap.fill(caption, wrap) for caption in captions]
    tall = max(text.count("\n") + 1 for text in texts) * 0.14 + 0.2
    with drawing(1.9 * columns, (1.9 + tall) * rows, title or None, nrows=rows, ncols=columns, squeeze=False) as (fig, axes):
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, image, text in zip(axes.flat, images, texts, strict=False):
            draw_image(ax, image)
            ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=7.5, parse_math=False)
    return fig


def curve(frame: pd.DataFrame, x: str, y: str, title: str = "", *, hue: str | None = None, **axes: Any) -> Figure:
    """`draw_lines` as a figure; `axes` as in `Axes.set` (xlabel, yscale, ylim ...)."""
    with drawing(6.0, 3.6) as (fig, ax):
        draw_lines(ax, frame, x, y, hue)
        ax.set(**({"title": title, "xlabel": x, "ylabel": y} | axes))
        if hue and len(frame):
            ax.legend(title=hue)
        sns.despine(fig)
    return fig


def setting_curves(
    frame: pd.DataFrame, x: str, title: str = "", *, xlabel: str, names: dict[str, str], hue: str | None = None
) -> Figure:
    """A panel per metric (names: metric -> label) with 95 % intervals. frame: x, metric, value, low, high (and hue)."""
    ticks = sorted(frame[x].unique())
    with drawing(2.9 * len(names), 3.1, title, ncols=len(names), squeeze=False) as (fig, axes):
        for ax, (metric, label) in zip(axes.flat, names.items(), strict=True):
            part = frame[frame["metric"] == metric]
            draw_lines(ax, part, x, hue=hue)
            if part["value"].isna().all():
                ax.text(0.5, 0.5, NOT_MEASURED, transform=ax.transAxes, ha="center", color=MUTED)
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            ax.set(xlabel=xlabel, title=label, ylim=(0, None))
        if hue is not None:
            handles, labels = axes.flat[-1].get_legend_handles_labels()
            fig.legend(handles, labels, loc="outside right center", title=hue)
    return fig


def heatmap(frame: pd.DataFrame, title: str = "", *, label: str) -> Figure:
    """A labelled grid of percentages: rows are the index, columns the columns; empty cells stay white."""
    with drawing(2.2 + 0.9 * frame.shape[1], 1.2 + 0.42 * frame.shape[0]) as (fig, ax):
        look = {"cmap": "viridis", "vmin": 0, "vmax": 100, "cbar_kws": {"label": label}, "lw": 1}
        sns.heatmap(frame.astype(float), ax=ax, annot=True, fmt=".0f", **look)
        ax.set(title=title, xlabel=frame.columns.name or "", ylabel=frame.index.name or "")
        ax.grid(False)  # else it shows in empty cells
        ax.tick_params(length=0)
        ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=25, ha="right")
    return fig


def table_figure(frame: pd.DataFrame, title: str = "", note: str = "", *, digits: int = 2, wrap: int = 28) -> Figure:
    """The frame as a picture: ruled head, right-aligned numbers, long cells wrapped, `note` in small print below."""
    if frame.empty:
        raise ValueError("an empty table cannot be drawn: it has no rows")
    body = [[textwrap.fill(text, wrap) for text in row] for row in cells(frame, digits)]
    head = [textwrap.fill(str(name).replace("_", " "), 14) for name in frame.columns]
    lines = [max(text.count("\n") + 1 for text in row) for row in [head, *body]]
    widths = [max(max(map(len, text.split("\n"))) for text in column) + 2 for column in zip(head, *body, strict=True)]
    right = np.cumsum(widths)
    with drawing(max(4.0, 0.075 * right[-1]), 0.19 * sum(lines) + 0.09 * len(lines) + 0.35) as (fig, ax):
        ax.set(xlim=(0, right[-1]), ylim=(sum(lines) + 0.5 * len(lines), 0))
        ax.set_axis_off()
        y = 0.0
        for number, (row, count) in enumerate(zip([head, *body], lines, strict=True)):
            for text, start, end, name in zip(row, right - widths, right, frame.columns, strict=True):
                numeric = pd.api.types.is_numeric_dtype(frame[name]) if frame.columns.is_unique else False
                x, side = (end - 1, "right") if numeric else (start + 0.5, "left")
                weight = "normal" if number else "bold"
                ax.text(x, y + (count + 0.5) / 2, text, ha=side, va="center", fontsize=8, weight=weight, parse_math=False)
            y += count + 0.5
            ax.axhline(y, color=INK, lw=0.3 if number else 1.0, alpha=1.0 if number == 0 else 0.35)
        if title:
            ax.set_title(textwrap.fill(title, max(40, int(right[-1]))), loc="left", parse_math=False)
        if note:
            footer(fig, note)
    return fig
