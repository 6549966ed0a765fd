"""A radar chart: several systems, one axis per group of questions (Fig. 1). It draws numbers that were computed elsewhere."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medv.companion.figures.plots import PALETTE, accuracy_bars, theme

MARKERS = "osD^vPX"


def radar(frame: pd.DataFrame, title: str = "", *, labels: Mapping[str, str] | None = None) -> Figure:
    """A polygon per system on axes from 0 to 100. frame: system, group, value (percent); labels: group -> its text.

    Raises ValueError with fewer than three groups, which span no area.
    """
    groups = list(dict.fromkeys(frame["group"]))
    if len(groups) < 3:
        raise ValueError(f"a radar needs at least three groups, but there are {len(groups)}: {', '.join(groups)}")
    angles = np.linspace(0, 2 * np.pi, len(groups), endpoint=False)
    around = np.append(angles, angles[0])
    with theme():
        fig = Figure(figsize=(8.2, 4.6), layout="constrained")
        ax = fig.add_subplot(projection="polar")
        ax.set_theta_offset(np.pi / 2)
        ax.set_theta_direction(-1)
        for place, (system, part) in enumerate(frame.groupby("system", sort=False)):
            values = part.set_index("group")["value"].reindex(groups).to_numpy(float)
            color, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
            style = ("-", "--", ":", "-.")[place % 4]
            ax.plot(around, np.append(values, values[0]), style, color=color, marker=marker, ms=4, lw=1.7, label=system)
        ax.set(ylim=(0, 100))
        ax.set_xticks(angles, [(labels or {}).get(group, group) for group in groups])
        ax.set_yticks([25, 50, 75, 100])
        ax.tick_params(axis="x", pad=12)
        ax.set_title(title, pad=22)
        fig.legend(loc="outside right center")
    return fig


def group_scores(frame: pd.DataFrame, title: str = "", *, labels: Mapping[str, str] | None = None) -> Figure:
    """The groups of a benchmark as a `radar`, or, where there are fewer than three, as bars with the overall score.

    frame: system, group (one of them "overall"), value, low, high.
    """
    groups = frame[frame["group"] != "overall"]
    if groups["group"].nunique() > 2:
        return radar(groups, title, labels=labels)
    return accuracy_bars(frame.assign(metric=frame["group"].replace(labels or {})), title)
