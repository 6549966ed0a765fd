"""What is lost when a text is written with fewer forwards: every schedule, filter and revision at the same budgets.

Two judges. The oracle (`studies.markov`) is a text source whose exact posterior is the denoiser, so that what is lost is
the sampler's own doing: likelihood, bigrams, tokens hit. A trained model is judged by the facts in its descriptions. Both by
repetition. Scores are kept one by one, so that strategies are compared on the same prompts. It knows no wall clock; section
6.4 of the paper asks for what is compared here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medv.companion.studies.markov import MarkovText, blurred_evidence, word_chain
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import DuplicateVeto, MinSpacing
from medv.diffusion.revision import ReMDM, RevealRemask, Revision
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import (
    LINEAR,
    BudgetedSchedule,
    EntropyBoundSchedule,
    FactorSchedule,
    Filter,
    FixedSchedule,
    Schedule,
    ThresholdSchedule,
)
from medv.evaluation.answering import Answerer
from medv.evaluation.text import distinct_n, repetition
from medv.intervals import NOT_MEASURED, bootstrap_interval, span, verdict
from medv.phantoms.facts import score_description

BASE, OURS, TEXT = "fixed", "adaptive + veto", "the text itself"
HALVED = ("adjacent_duplicates", "longest_run")
"""The measures of repetition that the adaptive schedule with the veto is to halve."""


@dataclass(frozen=True)
class Strategy:
    """How a budget is spent: what is written, what waits, what is taken back."""

    schedule: Schedule = LINEAR
    filters: tuple[Filter, ...] = ()
    revision: Revision | None = None

    def applied(self, config: SamplerConfig, steps: int) -> SamplerConfig:
        """The configuration with this strategy and `steps` forwards."""
        own = {"schedule": self.schedule, "filters": self.filters, "revision": self.revision}
        return replace(config, steps=steps, **own)


SCHEDULES: dict[str, Schedule] = {
    BASE: LINEAR,
    "cosine": FixedSchedule("cosine"),
    "shift 3": FixedSchedule("shift", 3.0),
    "shift 1/3": FixedSchedule("shift", 1 / 3),
    "threshold 0.9": ThresholdSchedule(0.9),
    "factor 1": FactorSchedule(1.0),
    "entropy bound 0.1": EntropyBoundSchedule(0.1),
    "adaptive": BudgetedSchedule(),
}
FILTERS: dict[str, tuple[Filter, ...]] = {
    "veto": (DuplicateVeto(),),
    "spacing": (MinSpacing(2),),
    "spacing + veto": (MinSpacing(2), DuplicateVeto()),
}
REVISIONS: dict[str, Revision] = {"remask": RevealRemask(), "ReMDM": ReMDM()}


def strategies() -> dict[str, Strategy]:
    """By name: every schedule bare, with the veto, and with spacing and veto; fixed and adaptive with all else too."""
    found = {name: Strategy(schedule) for name, schedule in SCHEDULES.items()}
    for name, schedule in SCHEDULES.items():
        for filters in FILTERS if name in (BASE, "adaptive") else ("veto", "spacing + veto"):
            found[f"{name} + {filters}"] = Strategy(schedule, FILTERS[filters])
    for name in (BASE, f"{BASE} + veto", OURS, f"{OURS.replace('veto', 'spacing + veto')}"):
        for again, revision in REVISIONS.items():
            found[f"{name} + {again}"] = replace(found[name], revision=revision)
    return found


def chosen(names: Iterable[str]) -> dict[str, Strategy]:
    """These strategies; raises ValueError for an unknown name."""
    known = strategies()
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown strategy {', '.join(unknown)}: use {', '.join(known)}")
    return {name: known[name] for name in names}


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
    the chain; a group as small as this is at some distance in any case, which is what `TEXT`, the true texts, shows.
    token_accuracy: share of the true tokens, percent. Steps of `TEXT` are 0.
    """
    frames = []
    bar = tqdm(total=len(seeds) * len(known) * len(steps), desc="oracle", unit="run", disable=quiet)
    for seed in seeds:
        source = word_chain(seed=seed)
        truth = source.draw(texts, config.gen_length, seed=seed)
        denoise = source.denoiser(blurred_evidence(source, truth, block_length=config.block_length, seed=seed))
        frames.append(_oracle_items(TEXT, 0, source, truth, truth, [0] * texts, seed, group))
        for name, strategy in known.items():
            for budget in steps:
                own = replace(strategy.applied(config, budget), stop_tokens=(), seed=seed)
                empty = torch.zeros(texts, 0, dtype=torch.long)
                output = sample(denoise, empty, own, mask_token_id=source.mask_token_id, fill_token_id=0)
                written = (output.sequences, truth, output.forwards)
                frames.append(_oracle_items(name, budget, source, *written, seed, group))
                bar.update()
    bar.close()
    return pd.concat(frames, ignore_index=True)


def _oracle_items(
    name: str,
    budget: int,
    source: MarkovText,
    tokens: torch.Tensor,
    truth: torch.Tensor,
    forwards: Sequence[int],
    seed: int,
    group: int,
) -> pd.DataFrame:
    scores = [_repetition(row) for row in tokens.tolist()]
    likelihood = (source.log_likelihood(tokens) / tokens.shape[1]).tolist()
    hits = (100 * (tokens == truth).double().mean(dim=1)).tolist()
    for row, score in enumerate(scores):
        score |= {"log_likelihood": likelihood[row], "token_accuracy": hits[row], "forwards": forwards[row]}
    distances = [{"bigram_distance": bigram_distance(source, part)} for part in tokens.split(group)]
    return pd.concat(
        [
            _items(name, budget, [f"{seed}/{row}" for row in range(len(scores))], scores),
            _items(name, budget, [f"{seed}/group {row}" for row in range(len(distances))], distances),
        ]
    )


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
    """Descriptions of phantoms: strategy, steps, unit (the example's id), metric, score; f1, precision and recall in percent.

    `TEXT` are the reference descriptions. Repetition is counted in tokens of the text. Facts are counted where an example has
    a scene; else the three are NaN.
    """
    scenes = [example.meta.get("scene") for example in examples]
    ids = [example.id for example in examples]
    bar = tqdm(total=len(known) * len(steps), desc="descriptions", unit="run", disable=quiet)

    def judged(name: str, budget: int, texts: Sequence[str], forwards: Sequence[int]) -> pd.DataFrame:
        scores = []
        for text, scene, count in zip(texts, scenes, forwards, strict=True):
            score = _repetition(answerer.processor.tokenizer.encode(text, add_special_tokens=False))
            fact = None if scene is None else score_description(text, scene)
            score |= {name: 100 * getattr(fact, name) if fact else np.nan for name in ("f1", "precision", "recall")}
            scores.append(score | {"forwards": count})
        return _items(name, budget, ids, scores)

    frames = [judged(TEXT, 0, [example.answer for example in examples], [0] * len(examples))]
    for name, strategy in known.items():
        for budget in steps:
            own = strategy.applied(config, budget)
            answers = answerer.answer(examples, own, batch_size=batch_size, quiet=True)
            frames.append(judged(name, budget, [a.text for a in answers], [a.forwards for a in answers]))
            bar.update()
    bar.close()
    return pd.concat(frames, ignore_index=True)


def _repetition(tokens: Sequence[int]) -> dict[str, float]:
    """As `medv.evaluation.text` measures, shares in percent."""
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


def summarize_quality(items: pd.DataFrame, *, resamples: int = 1000) -> pd.DataFrame:
    """Mean and 95 % bootstrap interval over units: strategy, steps, metric, value, low, high, n."""
    rows = []
    for (strategy, steps, metric), part in items.groupby(["strategy", "steps", "metric"], sort=False):
        known = part["score"].dropna()
        low, high = _interval(known, resamples)
        row = {"strategy": strategy, "steps": steps, "metric": metric, "value": known.mean()}
        rows.append(row | {"low": low, "high": high, "n": len(known)})
    return pd.DataFrame(rows)


def _interval(values: Sequence[float], resamples: int) -> tuple[float, float]:
    return bootstrap_interval(values, seed=0, resamples=resamples) if len(values) else (np.nan, np.nan)


def against(items: pd.DataFrame, strategy: str = OURS, base: str = BASE, *, resamples: int = 1000) -> pd.DataFrame:
    """A strategy beside the base on the same units, by budget and metric.

    Columns: steps, metric, base, value, gap (value - base), low, high (95 % paired bootstrap of the gap), ratio (value /
    base; NaN where the base is 0), n (units measured in both; without any all numbers are NaN).
    """
    rows = []
    pair = items[items["strategy"].isin((strategy, base))]
    for (steps, metric), part in pair.groupby(["steps", "metric"], sort=False):
        grid = part.pivot(index="unit", columns="strategy", values="score").dropna()
        gap = grid[strategy] - grid[base]
        low, high = _interval(gap, resamples)
        before, after = grid[base].mean(), grid[strategy].mean()
        row = {"steps": steps, "metric": metric, "base": before, "value": after, "gap": gap.mean()}
        rows.append(row | {"low": low, "high": high, "ratio": after / before if before else np.nan, "n": len(gap)})
    return pd.DataFrame(rows)


def verdicts(compared: pd.DataFrame, *, keeps: str) -> list[str]:
    """One sentence a budget on `against`: is repetition halved, and is the metric `keeps` (higher is better) not worse?

    A run cannot be shorter than one token, so its excess over one is what can be halved; the plain ratio is told too. "Not
    worse": the interval of the gap does not lie below 0 as a whole. What has no numbers is "not measured".
    """
    told = []
    for steps, part in compared.groupby("steps"):
        by = part.set_index("metric")
        repeats, run, kept = (*(by.loc[name] for name in HALVED), by.loc[keeps])
        halved = [(repeats["value"], repeats["base"]), (run["value"] - 1, run["base"] - 1)]
        words = [NOT_MEASURED if np.isnan(a) else "at most half" if a <= b / 2 else "more than half" for a, b in halved]
        said = verdict(kept["low"], kept["high"], above="better", below="worse")
        gap = span(kept["gap"], kept["low"], kept["high"], form="+.2f")
        told.append(
            f"Z = {steps}: adjacent duplicates {repeats['base']:.2f} -> {repeats['value']:.2f} % ({words[0]}); longest run "
            f"{run['base']:.2f} -> {run['value']:.2f}, ratio {run['ratio']:.2f}, excess over one {words[1]}; {keeps} "
            f"{kept['base']:.2f} -> {kept['value']:.2f}, gap {gap} ({said}), n = {int(kept['n'])}"
        )
    return told


def front(points: pd.DataFrame, cost: str, gain: str) -> pd.Series:
    """Which rows no other row beats: none is as cheap or cheaper and gains more, or as good and cheaper; bool per row.

    A row without a gain is not among them.
    """
    cheap, good = points[cost].to_numpy(float), points[gain].to_numpy(float)
    no_dearer, no_worse = cheap[None] <= cheap[:, None], good[None] >= good[:, None]
    beaten = no_dearer & no_worse & ((cheap[None] < cheap[:, None]) | (good[None] > good[:, None]))
    return pd.Series(~beaten.any(axis=1) & np.isfinite(good), index=points.index)


def beside(summary: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The summary with a row for each strategy and budget and a column of means for each metric."""
    wide = summary.pivot_table(index=["strategy", "steps"], columns="metric", values="value", sort=False)
    return wide[list(metrics)].reset_index().rename_axis(columns=None)
