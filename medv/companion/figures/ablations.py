"""The figure of notebook 31: what LoRA and full fine-tuning reach, and what they cost.

Frames in, figure out, as in `medv.companion.figures.plots`; nothing is trained or scored here.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from medv.companion.figures.plots import INK, MUTED, PALETTE, new_figure, theme

COSTS = {
    "trainable_parameters": "trained\nparameters",
    "peak_memory_bytes": "peak\nmemory",
    "step_seconds": "step\ntime",
    "checkpoint_bytes": "checkpoint\nsize",
}


def lora_figure(curve: pd.DataFrame, cost: pd.DataFrame, levels: Mapping[str, float], *, full: str = "full") -> Figure:
    """Left: score against training questions with 95 % intervals. Right: what an arm costs, in percent of `full`.

    curve: arm, size, value, low, high (percent). cost: arm and the columns of COSTS. levels: dashed lines, by name.
    """
    arms = list(cost["arm"])
    with theme():
        fig, (left, right) = new_figure(11.5, 4.3, ncols=2, gridspec_kw={"width_ratios": [1.1, 1]})
        for place, arm in enumerate(arms):
            rows = curve[curve["arm"] == arm].sort_values("size")
            at = rows["size"] * 1.06 ** (place - (len(arms) - 1) / 2)  # side by side, so that intervals are seen
            spread = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["value"].to_numpy(float))
            style = {"color": PALETTE[place], "marker": "os^Dvp"[place % 6], "ms": 5, "lw": 1.6, "capsize": 3}
            left.errorbar(at, rows["value"], yerr=spread, label=arm, **style)
        for (name, value), line in zip(levels.items(), ("--", ":", "-."), strict=False):
            left.axhline(value, color=MUTED, lw=1.2, ls=line, label=name)
        sizes = sorted(set(curve["size"]))
        left.set(xscale="log", xlabel="training questions", ylabel="score (%)", title="Test score after stage 3")
        left.set_xticks(sizes, [str(size) for size in sizes])
        left.xaxis.set_minor_locator(NullLocator())
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        width = 0.8 / len(arms)
        base = cost.set_index("arm").loc[full]
        for place, row in enumerate(cost.to_dict("records")):
            at = np.arange(len(COSTS)) + (place - (len(arms) - 1) / 2) * width
            shares = [100 * row[name] / base[name] for name in COSTS]
            right.bar(at, shares, width * 0.92, color=PALETTE[place], label=row["arm"])
            for x, share in zip(at, shares, strict=True):
                right.text(x, share + 1.5, f"{share:.0f}", ha="center", va="bottom", fontsize=7.5, color=INK)
        right.set_xticks(range(len(COSTS)), COSTS.values())
        right.set(title="Cost of a training", ylabel=f"percent of {full} fine-tuning")
        right.grid(False, axis="x")
        right.margins(y=0.1)  # room for the numbers
    return fig
