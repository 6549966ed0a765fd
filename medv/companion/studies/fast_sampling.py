"""Fast sampling (notebook 40): every schedule, filter and revision at the same budgets, and the cost of each sampler.

Two judges. The oracle (`studies.markov`) is a text source whose exact posterior is the denoiser, so all losses are due to the
sampler: likelihood, bigrams, tokens hit. A trained model is judged by the facts in its descriptions, both by repetition. Scores
are kept per text, so that strategies are compared on the same prompts. Section 6.4 of the paper leaves this comparison open.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medv.companion.bench.sampler import BenchResult
from medv.companion.studies.markov import MarkovText, blurred_evidence, word_chain
from medv.companion.studies.node import Node
from medv.companion.studies.requests import text_scores
from medv.companion.studies.summaries import summarize_scores
from medv.data.example import Example
from medv.diffusion import schedules
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import DuplicateVeto, MinSpacing
from medv.diffusion.revision import ReMDM, RevealRemask
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import FixedSchedule, Schedule
from medv.evaluation.answering import Answerer
from medv.evaluation.text import distinct_n, repetition
from medv.intervals import NOT_MEASURED, Estimate, bootstrap

NODE = Node(
    "fast_sampling",
    "40_fast_sampling.ipynb",
    "Sampling: speed and quality against forwards",
    needs=("models/stage2",),
    results=("pareto", "cache_agreement", "sampler_speed"),
    reads=("qa50",),
    alone=True,
)

BASE, OURS, TEXT = "fixed", "adaptive + veto", "the text itself"
RESAMPLES = 1000
HALVED = ("adjacent_duplicates", "longest_run")
"""The measures of repetition that the adaptive schedule with the veto is to halve."""


_NAMES = {"linear": BASE, "shift": "shift 3", "threshold": "threshold 0.9", "factor": "factor 1"}
_NAMES |= {"entropy": "entropy bound 0.1", "budgeted": "adaptive"}
SCHEDULES: dict[str, Schedule] = {}
for _name, _schedule in schedules.SCHEDULES.items():
    SCHEDULES[_NAMES.get(_name, _name)] = _schedule
    if _name == "shift":
        SCHEDULES["shift 1/3"] = FixedSchedule("shift", 1 / 3)
FILTERS = {"veto": (DuplicateVeto(),), "spacing": (MinSpacing(2),), "spacing + veto": (MinSpacing(2), DuplicateVeto())}
REVISIONS = {"remask": RevealRemask(), "ReMDM": ReMDM()}
Strategy = dict[str, Any]
"""schedule, filters and revision, as options of `SamplerConfig`."""
ON_MODEL = (BASE, f"{BASE} + veto", "threshold 0.9", "adaptive", OURS)
"""The strategies that the trained model is asked with; all of them take too long for a notebook."""


def strategies() -> dict[str, Strategy]:
    """By name: every schedule bare, with the veto, and with spacing and veto; fixed and adaptive also with the others."""
    found = {name: {"schedule": schedule} for name, schedule in SCHEDULES.items()}
    for name, schedule in SCHEDULES.items():
        for filters in FILTERS if name in (BASE, "adaptive") else ("veto", "spacing + veto"):
            found[f"{name} + {filters}"] = {"schedule": schedule, "filters": FILTERS[filters]}
    for name in (BASE, f"{BASE} + veto", OURS, f"{OURS.replace('veto', 'spacing + veto')}"):
        for again, revision in REVISIONS.items():
            found[f"{name} + {again}"] = found[name] | {"revision": revision}
    return found


def chosen(names: Iterable[str]) -> dict[str, Strategy]:
    """These strategies; raises ValueError for an unknown name."""
    known, names = strategies(), list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown strategy {', '.join(unknown)}: use {', '.join(known)}")
    return {name: known[name] for name in names}


def oracle_strategies() -> dict[str, Strategy]:
    """Every schedule, bare and with the veto."""
    return chosen(name + extra for name in SCHEDULES for extra in ("", " + veto"))


def budgets(config: SamplerConfig, parts: Sequence[int] = (8, 4, 2)) -> list[int]:
    """L / 8, L / 4 and L / 2 forwards, each rounded up to a multiple of the number of blocks."""
    return sorted({-(-(config.gen_length // part) // config.blocks) * config.blocks for part in parts})


# --- The judges: one row a strategy, budget, unit and metric ---


def oracle_quality(
    known: Mapping[str, Strategy],
    config: SamplerConfig,
    steps: Sequence[int],
    *,
    texts: int = 64,
    seeds: Sequence[int] = (0, 1),
    group: int = 16,
    quiet: bool = True,
) -> pd.DataFrame:
    """Texts of `gen_length` written from blurred evidence: strategy, steps, unit, metric, score.

    Each seed is a chain of its own with `texts` texts; units are texts, for `bigram_distance` groups of so many texts.
    log_likelihood: of the chain, nats a token. bigram_distance: total variation between the bigrams of a group and those of
    the chain; the true texts, `TEXT` (0 steps), show what a group of this size has anyway. token_accuracy: percent.
    """
    frames, empty = [], torch.zeros(texts, 0, dtype=torch.long)
    bar = tqdm(total=len(seeds) * len(known) * len(steps), desc="oracle", unit="run", disable=quiet)
    for seed in seeds:
        source = word_chain(seed=seed)
        truth = source.draw(texts, config.gen_length, seed=seed)
        denoise = source.denoiser(blurred_evidence(source, truth, block_length=config.block_length, seed=seed))
        written = [(TEXT, 0, truth, [0] * texts)]
        for name, strategy in known.items():
            for budget in steps:
                own = replace(config, steps=budget, stop_tokens=(), seed=seed, **strategy)
                output = sample(denoise, empty, own, mask_token_id=source.mask_token_id, fill_token_id=0)
                written.append((name, budget, output.sequences, output.forwards))
                bar.update()
        for name, budget, tokens, forwards in written:
            likelihood = (source.log_likelihood(tokens) / tokens.shape[1]).tolist()
            hits = (100 * (tokens == truth).double().mean(dim=1)).tolist()
            scores = [
                _repetition(row) | {"log_likelihood": likely, "token_accuracy": hit, "forwards": count}
                for row, likely, hit, count in zip(tokens.tolist(), likelihood, hits, forwards, strict=True)
            ]
            distances = [{"bigram_distance": bigram_distance(source, part)} for part in tokens.split(group)]
            for kind, own in {f"{seed}/": scores, f"{seed}/group ": distances}.items():
                frames.append(_items(name, budget, [f"{kind}{number}" for number in range(len(own))], own))
    bar.close()
    return pd.concat(frames, ignore_index=True)


def bigram_distance(source: MarkovText, tokens: torch.Tensor) -> float:
    """Total variation, 0 .. 1, between the pairs of neighbors in texts [B, L] and those that the chain expects."""
    states = len(source.start)
    pairs = (tokens[:, :-1] * states + tokens[:, 1:]).flatten()
    counted = torch.bincount(pairs, minlength=states**2).double()
    expected = (source.start[:, None] * source.transition).flatten()
    return float((counted / counted.sum() - expected).abs().sum() / 2)


def model_quality(
    known: Mapping[str, Strategy],
    answerer: Answerer,
    examples: Sequence[Example],
    config: SamplerConfig,
    steps: Sequence[int],
    *,
    batch_size: int = 50,
    quiet: bool = True,
) -> pd.DataFrame:
    """Descriptions and the references (`TEXT`), repetition in tokens: strategy, steps, unit (the id), metric, score."""
    bar = tqdm(total=len(known) * len(steps), desc="descriptions", unit="run", disable=quiet)

    def judged(name: str, budget: int, texts: Sequence[str], forwards: Sequence[int]) -> pd.DataFrame:
        scores = []
        for text, example, count in zip(texts, examples, forwards, strict=True):
            score = _repetition(answerer.processor.tokenizer.encode(text, add_special_tokens=False))
            scores.append(score | text_scores(text, example) | {"forwards": count})
        return _items(name, budget, [example.id for example in examples], scores)

    frames = [judged(TEXT, 0, [example.answer for example in examples], [0] * len(examples))]
    for name, strategy in known.items():
        for budget in steps:
            own = replace(config, steps=budget, **strategy)
            answers = answerer.answer(examples, own, batch_size=batch_size, quiet=True)
            frames.append(judged(name, budget, [a.text for a in answers], [a.forwards for a in answers]))
            bar.update()
    bar.close()
    return pd.concat(frames, ignore_index=True)


def _repetition(tokens: Sequence[int]) -> dict[str, float]:
    """`medv.evaluation.text.repetition`, shares in percent."""
    found = repetition(tokens) | {"distinct_2": distinct_n(tokens, 2)}
    return {name: value if name == "longest_run" else 100 * value for name, value in found.items()}


def _items(name: str, budget: int, units: Sequence[str], scores: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    rows = [
        (name, budget, unit, metric, float(value))
        for unit, score in zip(units, scores, strict=True)
        for metric, value in score.items()
    ]
    return pd.DataFrame(rows, columns=["strategy", "steps", "unit", "metric", "score"])


# --- Reading the scores ---


def summarize_quality(items: pd.DataFrame, *, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Means over units: strategy, steps, metric, value, low, high, n."""
    return summarize_scores(items, ("strategy", "steps", "metric"), resamples=resamples)


def against(items: pd.DataFrame, strategy: str = OURS, base: str = BASE) -> pd.DataFrame:
    """A strategy beside the base on the same units, by budget and metric.

    Columns: steps, metric, base, value, gap (value - base), low, high (95 % paired bootstrap of the gap), ratio (value /
    base; NaN where the base is 0), n (units measured in both; without any all numbers are NaN).
    """
    rows = []
    pair = items[items["strategy"].isin((strategy, base))]
    for (steps, metric), part in pair.groupby(["steps", "metric"], sort=False):
        grid = part.pivot(index="unit", columns="strategy", values="score").dropna()
        gap = bootstrap(grid[strategy] - grid[base], resamples=RESAMPLES)
        before, after = grid[base].mean(), grid[strategy].mean()
        row = {"steps": steps, "metric": metric, "base": before, "value": after, "gap": gap.value}
        ratio = after / before if before else np.nan
        rows.append(row | {"low": gap.low, "high": gap.high, "ratio": ratio, "n": gap.n})
    return pd.DataFrame(rows)


def verdicts(compared: pd.DataFrame, *, keeps: str) -> list[str]:
    """One sentence a budget on `against`: is repetition halved, and is the metric `keeps` (higher is better) not worse?

    A run cannot be shorter than one token, so its excess over one is compared; the plain ratio is given too. Not worse: the
    interval of the gap does not lie below 0.
    """
    lines = []
    for steps, part in compared.groupby("steps"):
        by = part.set_index("metric")
        repeats, run, kept = (*(by.loc[name] for name in HALVED), by.loc[keeps])
        halved = [(repeats["value"], repeats["base"]), (run["value"] - 1, run["base"] - 1)]
        words = ["at most half" if after <= before / 2 else "more than half" for after, before in halved]
        for place, (_, before) in enumerate(halved):
            if not before > 0:
                words[place] = NOT_MEASURED if np.isnan(before) else "nothing to halve"
        gap = Estimate(kept["gap"], kept["low"], kept["high"])
        said = gap.verdict("better", "worse")
        lines.append(
            f"Z = {steps}: adjacent duplicates {repeats['base']:.2f} -> {repeats['value']:.2f} % ({words[0]}); longest run "
            f"{run['base']:.2f} -> {run['value']:.2f}, ratio {run['ratio']:.2f}, excess over one {words[1]}; {keeps} "
            f"{kept['base']:.2f} -> {kept['value']:.2f}, gap {gap.cell('+.2f')} ({said}), n = {int(kept['n'])}"
        )
    return lines


def front(points: pd.DataFrame, cost: str, gain: str) -> pd.Series:
    """The Pareto front, bool per row: no other row is as cheap and gains more, or as good and cheaper; NaN is not on it."""
    cheap, good = points[cost].to_numpy(float), points[gain].to_numpy(float)
    no_dearer, no_worse = cheap[None] <= cheap[:, None], good[None] >= good[:, None]
    beaten = no_dearer & no_worse & ((cheap[None] < cheap[:, None]) | (good[None] > good[:, None]))
    return pd.Series(~beaten.any(axis=1) & np.isfinite(good), index=points.index)


def beside(summary: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The summary with a row for each strategy and budget and a column of means for each metric."""
    wide = summary.pivot_table(index=["strategy", "steps"], columns="metric", values="value", sort=False)
    return wide[list(metrics)].reset_index().rename_axis(columns=None)


def quality_points(judged: Mapping[str, tuple[pd.DataFrame, str]]) -> pd.DataFrame:
    """The means of several judges with their forwards, for the figure: a row per judge, strategy, budget and metric.

    judged: for each judge its summary (`summarize_quality`) and its metric of quality. Columns: judge, strategy, steps,
    metric, value, low, high, n, forwards (used of the budget), front.
    """
    parts = []
    for judge, (summary, metric) in judged.items():
        spent = summary[summary["metric"] == "forwards"].set_index(["strategy", "steps"])["value"].rename("forwards")
        for name in (metric, "adjacent_duplicates"):
            part = summary[(summary["metric"] == name) & (summary["strategy"] != TEXT)]
            part = part.join(spent, on=["strategy", "steps"]).assign(judge=judge)
            signed = part.assign(gain=part["value"] * (1 if name == metric else -1))
            parts.append(part.assign(front=front(signed, "forwards", "gain")))
    columns = ["judge", "strategy", "steps", "metric", "value", "low", "high", "n", "forwards", "front"]
    return pd.concat(parts, ignore_index=True)[columns]


def on_front(points: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The strategies on the front, a line per judge and metric."""
    lines = []
    for (judge, metric), part in points[points["metric"].isin(metrics)].groupby(["judge", "metric"], sort=False):
        best = part[part["front"]].sort_values("forwards")
        names = ", ".join(f"{row.strategy} ({row.forwards:.0f})" for row in best.itertuples())
        lines.append(f"{judge}, {metric}: {names or NOT_MEASURED}")
    return "\n".join(lines)


def speed_table(result: BenchResult) -> pd.DataFrame:
    """The measurements with units: `timed` of `forwards` were run. No memory, which a used process cannot measure."""
    rows = []
    for m in result.measurements:
        row = {
            "sampler": m.name,
            "seconds": m.seconds,
            "tokens/s": m.tokens_per_second,
            "ratio": m.ratio,
            "forwards": m.forwards,
        }
        row["timed"] = m.forwards if m.measured_forwards is None else m.measured_forwards
        row["full forwards"] = m.refreshes or m.forwards
        rows.append(row | {"same commits (%)": None if m.agreement is None else 100 * m.agreement})
    return pd.DataFrame(rows)
