"""What is lost with few forwards, way of sampling by way of sampling: repetition, likelihood on the oracle, facts on a model.

Two judges. On the oracle text (`medv.diffusion.oracle`) the denoiser is the exact posterior, so that every loss is the
sampler's own, and the likelihood of what was written is exact. On a trained model descriptions are scored by the facts that
they state. Each row is one text, each way of sampling writes the same texts (same evidence, same images), so that ways are
compared text by text. Ways that stop early report the forwards they took. It draws no figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medv.data.example import Example
from medv.diffusion.filters import DuplicateVeto, MinSpacing
from medv.diffusion.oracle import MarkovText, blurred_evidence, word_chain
from medv.diffusion.revision import ReMDM, RevealRemask, Revision
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import SCHEDULES, Filter, Schedule
from medv.diffusion.settings import SamplerConfig
from medv.evaluation.answering import answer_examples
from medv.evaluation.findings import score_descriptions
from medv.evaluation.repetition import repetition
from medv.evaluation.vqa import bootstrap_interval
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor


@dataclass(frozen=True)
class Way:
    """One way of sampling: what `SamplerConfig` is told beside L, B and Z."""

    schedule: Schedule
    filters: tuple[Filter, ...] = ()
    revision: Revision | None = None


SPACED = (MinSpacing(2), DuplicateVeto())
FIXED, ADAPTIVE = "fixed, low confidence", "adaptive, with filters"
WAYS: dict[str, Way] = {
    FIXED: Way(SCHEDULES["linear"]),
    "fixed, random": Way(SCHEDULES["linear"]),
    "cosine": Way(SCHEDULES["cosine"]),
    "shift": Way(SCHEDULES["shift"]),
    "threshold": Way(SCHEDULES["threshold"]),
    "factor": Way(SCHEDULES["factor"]),
    "entropy bound": Way(SCHEDULES["entropy"]),
    "adaptive": Way(SCHEDULES["budgeted"]),
    "fixed, with filters": Way(SCHEDULES["linear"], SPACED),
    ADAPTIVE: Way(SCHEDULES["budgeted"], SPACED),
    "fixed, reveal and remask": Way(SCHEDULES["linear"], revision=RevealRemask()),
    "fixed, ReMDM": Way(SCHEDULES["linear"], revision=ReMDM()),
    "adaptive, filters, reveal and remask": Way(SCHEDULES["budgeted"], SPACED, RevealRemask()),
}
"""Every schedule, and what composes with them; the first is Algorithm 1 of the paper."""


def config_of(name: str, gen_length: int, block_length: int, steps: int, *, seed: int = 0) -> SamplerConfig:
    """The sampler configuration of a way. Raises ValueError for an unknown name."""
    if name not in WAYS:
        raise ValueError(f"unknown way of sampling {name!r}: use one of {', '.join(WAYS)}")
    way = WAYS[name]
    return SamplerConfig(
        gen_length,
        block_length,
        steps,
        remasking="random" if name == "fixed, random" else "low_confidence",
        schedule=way.schedule,
        filters=way.filters,
        revision=way.revision,
        seed=seed,
    )


def oracle_quality(
    *,
    steps: Sequence[int],
    ways: Sequence[str] = tuple(WAYS),
    texts: int = 100,
    gen_length: int = 64,
    block_length: int = 32,
    text: MarkovText | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> pd.DataFrame:
    """One row for each way, Z and text: way, steps, id, forwards, the measures of `repetition`, and log_likelihood, the mean
    over the text of log p(token, evidence) in nats.

    Every text is written from the same blurred evidence of a text drawn from the chain. "the chain itself" is what was drawn.
    """
    text = text or word_chain(seed=seed)
    drawn = text.draw(texts, gen_length, seed=seed)  # [n, L]
    evidence = blurred_evidence(text, drawn, block_length=block_length, seed=seed)  # [n, L, states]
    prompt, mask = drawn.new_zeros(texts, 0), text.mask_token_id
    frames = [_oracle_rows("the chain itself", 0, [0] * texts, drawn, text, evidence)]
    for name in tqdm(ways, desc="oracle", unit="way", disable=quiet):
        for count in steps:
            config = config_of(name, gen_length, block_length, count, seed=seed)
            output = sample(text.denoiser(evidence), prompt, config, mask_token_id=mask, fill_token_id=mask)
            frames.append(_oracle_rows(name, count, output.forwards, output.sequences, text, evidence))
    return pd.concat(frames, ignore_index=True)


def _oracle_rows(
    name: str, steps: int, forwards: Sequence[int], tokens: torch.Tensor, text: MarkovText, evidence: torch.Tensor
) -> pd.DataFrame:
    seen = evidence.gather(2, tokens[..., None])[..., 0].log().sum(dim=1)  # [n]
    likelihood = ((text.log_likelihood(tokens) + seen) / tokens.shape[1]).tolist()
    rows = [
        {"id": str(i), "forwards": forwards[i], **repetition(ids), "log_likelihood": likelihood[i]}
        for i, ids in enumerate(tokens.tolist())
    ]
    return pd.DataFrame(rows).assign(way=name, steps=steps)


def description_quality(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    examples: Sequence[Example],
    *,
    steps: Sequence[int],
    gen_length: int,
    block_length: int,
    ways: Sequence[str] = tuple(WAYS),
    seed: int = 0,
    quiet: bool = False,
) -> pd.DataFrame:
    """One row for each way, Z and image: way, steps, id, forwards, words, the measures of `repetition` on words, and the
    precision, recall and f1 of the stated facts in percent.

    `examples` ask for descriptions of phantoms (`description_set`), whose truth is known.
    """
    scenes = [example.meta["scene"] for example in examples]
    rows = []
    for name in tqdm(ways, desc="descriptions", unit="way", disable=quiet):
        for count in steps:
            config = config_of(name, gen_length, block_length, count, seed=seed)
            answers = answer_examples(model, processor, examples, config, quiet=True)
            judged = score_descriptions([answer.text for answer in answers], scenes).items
            for answer, item in zip(answers, judged, strict=True):
                words = answer.text.split()
                facts = {metric: getattr(item, metric) for metric in ("precision", "recall", "f1")}
                cost = {"id": answer.id, "forwards": answer.forwards, "words": len(words)}
                rows.append({"way": name, "steps": count} | cost | repetition(words) | facts)
    return pd.DataFrame(rows)


def summarize_quality(items: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The mean of each measure with its 95 % interval over texts (bootstrap): way, steps, metric, value, low, high, n."""
    rows = []
    metrics = [column for column in items.columns if column not in ("way", "steps", "id")]
    for (name, steps), part in items.groupby(["way", "steps"], sort=False):
        for metric in metrics:
            values = part[metric].to_numpy(dtype=float)
            low, high = bootstrap_interval(values, seed=seed)
            row = {"way": name, "steps": steps, "metric": metric, "value": values.mean()}
            rows.append(row | {"low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)


def compare_ways(
    items: pd.DataFrame, better: str, base: str, *, judged_by: str, tolerance: float, seed: int = 0
) -> pd.DataFrame:
    """At each Z, what `better` does to repetition and to the judge's metric, text by text: one row a Z.

    duplicates_ratio and run_ratio: its adjacent duplicates and its longest run over those of `base` (NaN where `base` has
    none). change, low, high: of `judged_by`, with the 95 % interval of the paired difference. halves: both ratios are at most
    1/2, a run counted beyond the one token that every text has. not_worse: the interval does not lie below `-tolerance`.
    """
    rows = []
    for steps, part in items.groupby("steps", sort=True):
        grids = {m: part.pivot(index="id", columns="way", values=m) for m in (*REPEATED, judged_by)}
        if not {better, base} <= set(grids[judged_by].columns):
            continue
        means = {m: grids[m].mean() for m in REPEATED}
        beyond = means["longest_run"] - 1
        ratios = _ratio(means["adjacent_duplicates"], better, base), _ratio(beyond, better, base)
        gap = (grids[judged_by][better] - grids[judged_by][base]).to_numpy()
        low, high = bootstrap_interval(gap, seed=seed)
        rows.append(
            {
                "steps": steps,
                "duplicates_ratio": ratios[0],
                "run_ratio": ratios[1],
                "halves": all(not ratio > 0.5 for ratio in ratios),
                "judged_by": judged_by,
                "change": gap.mean(),
                "low": low,
                "high": high,
                "not_worse": bool(high >= -tolerance and gap.mean() >= -tolerance),
                "n": len(gap),
            }
        )
    return pd.DataFrame(rows)


REPEATED = ("adjacent_duplicates", "longest_run")


def _ratio(means: Mapping[str, float], better: str, base: str) -> float:
    return means[better] / means[base] if means[base] > 0 else np.nan
