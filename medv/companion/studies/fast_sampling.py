"""What notebook 40 does: how large it measures, and its results as frames.

The measurements themselves are in `medv.companion.studies.sampler_quality`, `medv.companion.bench.cache_agreement` and
`medv.companion.bench.sampler`; here are the sizes that fit a notebook, and what is laid side by side. It draws nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from medv.companion.bench.sampler import PRESETS, BenchResult, BenchShape
from medv.companion.studies import sampler_quality as quality
from medv.companion.studies.node import Node
from medv.diffusion.config import SamplerConfig
from medv.intervals import NOT_MEASURED
from medv.profiles import Profile

NODES = (
    Node(
        "fast_sampling",
        "40_fast_sampling.ipynb",
        "Sampling: speed and quality against forwards",
        needs=("models/stage2",),
        results=("pareto", "cache_agreement", "sampler_speed"),
        alone=True,
    ),
)

ON_MODEL = (quality.BASE, "fixed + veto", "threshold 0.9", "adaptive", quality.OURS)
"""What the trained model is asked with, out of `strategies`; all of it takes too long for a notebook."""


@dataclass(frozen=True)
class Sizes:
    """oracle: L, B of its texts, `texts` of them for each chain. descriptions, cached: images described by the trained model
    for quality and for cache agreement. bench: the random network whose speed is measured.
    """

    oracle: SamplerConfig
    texts: int
    descriptions: int
    cached: int
    bench: BenchShape

    @classmethod
    def of(cls, profile: Profile) -> "Sizes":
        """Those of a profile: seconds for the tests, the paper's shape for its own, and minutes elsewhere."""
        if profile.name == "smoke":
            shape = BenchShape(16, 32, 1, 2, vocab_size=1000, prompt_length=12, gen_length=8, block_length=4)
            return cls(SamplerConfig(16, 8, 16), 8, 4, 2, shape)
        if profile.name == "paper":
            return cls(SamplerConfig(256, 64, 256), 64, 193, 32, PRESETS["gpu"])
        shape = BenchShape(256, 768, 4, 4, prompt_length=200, gen_length=64, block_length=32)
        return cls(SamplerConfig(64, 32, 64), 24, 32, 8, shape)


def oracle_strategies() -> dict[str, quality.Strategy]:
    """Every schedule, bare and with the veto."""
    return quality.chosen(name + extra for name in quality.SCHEDULES for extra in ("", " + veto"))


def quality_points(judged: Mapping[str, tuple[pd.DataFrame, str]]) -> pd.DataFrame:
    """The means of several judges with their forwards, to be drawn: one row a judge, strategy, budget and metric.

    judged: for each judge its summary (`summarize_quality`) and the metric of quality. Columns: judge, strategy, steps,
    metric, value, low, high, n, forwards (what was used of the budget), front (of quality: `quality.front`).
    """
    parts = []
    for judge, (summary, metric) in judged.items():
        spent = summary[summary["metric"] == "forwards"].set_index(["strategy", "steps"])["value"].rename("forwards")
        for name in (metric, "adjacent_duplicates"):
            part = summary[(summary["metric"] == name) & (summary["strategy"] != quality.TEXT)]
            part = part.join(spent, on=["strategy", "steps"]).assign(judge=judge)
            signed = part.assign(gain=part["value"] * (1 if name == metric else -1))
            parts.append(part.assign(front=quality.front(signed, "forwards", "gain")))
    columns = ["judge", "strategy", "steps", "metric", "value", "low", "high", "n", "forwards", "front"]
    return pd.concat(parts, ignore_index=True)[columns]


def on_front(points: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Which strategies are nowhere beaten, judge by judge, in words."""
    told = []
    for (judge, metric), part in points[points["metric"].isin(metrics)].groupby(["judge", "metric"], sort=False):
        best = part[part["front"]].sort_values("forwards")
        names = ", ".join(f"{row.strategy} ({row.forwards:.0f})" for row in best.itertuples())
        told.append(f"{judge}, {metric}: {names or NOT_MEASURED}")
    return "\n".join(told)


def speed_table(result: BenchResult) -> pd.DataFrame:
    """The measurements with their units in the names; of `forwards`, `timed` were run and the seconds scaled to all.

    Memory is left to `medv bench sampler`: in a process that has held much before, what a row takes is hardly seen.
    """
    return pd.DataFrame(
        [
            {
                "sampler": m.name,
                "seconds": m.seconds,
                "tokens/s": m.tokens_per_second,
                "ratio": m.ratio,
                "forwards": m.forwards,
                "timed": m.forwards if m.measured_forwards is None else m.measured_forwards,
                "full forwards": m.forwards if not m.refreshes else m.refreshes,
                "same commits (%)": None if m.agreement is None else 100 * m.agreement,
            }
            for m in result.measurements
        ]
    )
