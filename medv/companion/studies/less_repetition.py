"""Less repetition at equal forwards (notebook 34): an answer to section 6.4 of the paper, and what did not help.

"phrases" is `PhraseVeto`, a filter of the library. The schedules of this module halve no repetition of phrases and are measured
here alone: a soft window of far positions (after Conv, arXiv 2509.15188), an order by confidence without what the all-masked
answer says anyway, and the discount of candidates that attend to doubtful ones of the same forward (after ADAS, arXiv
2606.10829). The last two look into the network: they sample by plain forwards.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import pad

from medv.companion.studies.generation import canvas_of, measured, plain_configs, table5_settings
from medv.companion.studies.node import Node
from medv.companion.studies.summaries import change, means, summarize_answers
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import DuplicateVeto, PhraseVeto
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import Filter, Schedule, StepState, best_candidates, pace
from medv.evaluation.answering import Answerer
from medv.evaluation.text import measure_answer
from medv.intervals import NOT_MEASURED, Estimate
from medv.phantoms.sets import description_set
from medv.profiles import Profile

NODE = Node(
    "less_repetition",
    "34_less_repetition.ipynb",
    "Less repetition at equal forwards",
    needs=("models/stage2", "answers/generation_settings"),
    makes=("answers/less_repetition",),
    results=("less_repetition", "repetition_front", "less_repetition_oracle", "effects_less_repetition"),
    reads=("qa50",),
    may_read=("judge",),
    heavy=True,
)

BASE, OURS, TEXT = "linear", "linear, phrase veto", "the references"
HALF, MARGIN = 0.5, 2.0  # repetition is to halve while the score falls by less than so many points
REPETITION = {"repeated_share": "repeated words", "adjacent_duplicates": "adjacent duplicates"}
SENTENCES, TRAINING_TEXTS = "whole_sentences", 4000


# --- Schedules of this study ---


@dataclass(frozen=True)
class SoftWindow(Schedule):
    """Equal steps; the log-confidence of a position falls by `decay` for each place from the first open one."""

    decay: float = 0.05

    def select(self, state: StepState) -> torch.Tensor:
        """The best candidates by discounted confidence."""
        first = state.positions.masked_fill(~state.open, state.response.shape[1]).amin(dim=1, keepdim=True)  # [B, 1]
        distance = (state.positions - first).clamp_min(0)
        return best_candidates(state, pace(state), state.score - self.decay * distance)


class Watched:
    """A plain denoiser that keeps the log-probabilities of the all-masked answer, [B, L, V], and on request the attention
    between its positions, mean over heads and layers, [B, L, L].
    """

    def __init__(self, answerer: Answerer, examples: Sequence[Example], *, attention: bool):
        self.model, self.keeps_attention = answerer.model, attention
        self.inputs = dict(answerer.inputs(examples))
        self.features = self.inputs.pop("image_features", None)
        if (pixels := self.inputs.pop("pixel_values", None)) is not None:
            with torch.inference_mode():
                self.features = self.model.model.get_image_features(pixels, self.inputs.pop("image_layouts", None))
        self.prior: torch.Tensor | None = None
        self.attention: torch.Tensor | None = None

    def __call__(self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        """Logits [B, L, V] of the canvas [B, T] at `columns`."""
        seen = pad(self.inputs["attention_mask"], (0, canvas.shape[1] - self.inputs["attention_mask"].shape[1]), value=1)
        embeds = self.model.model.embed(canvas, self.features)  # [B, T, D]
        positions = (seen.cumsum(dim=1) - 1).clamp_min(0)
        found = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=seen,
            position_ids=positions,
            use_cache=False,
            output_attentions=self.keeps_attention,
        )
        if self.keeps_attention:
            self.attention = torch.stack([layer.mean(dim=1)[:, columns, columns] for layer in found.attentions]).mean(dim=0)
        logits = self.model.lm_head(found.last_hidden_state[:, columns])
        if self.prior is None:  # the first forward: all masks
            self.prior = logits.float().log_softmax(dim=-1)
        return logits


@dataclass(frozen=True)
class Calibrated(Schedule):
    """Equal steps by log-confidence minus `strength` times the log-probability that the all-masked answer gives the token."""

    watched: Watched
    strength: float = 0.1

    def select(self, state: StepState) -> torch.Tensor:
        """The best candidates by calibrated confidence."""
        rows = torch.arange(len(state.tokens), device=state.tokens.device)[:, None]
        prior = self.watched.prior[rows, state.positions, state.tokens]  # [B, K]
        return best_candidates(state, pace(state), state.score - self.strength * prior)


@dataclass(frozen=True)
class DependenceAware(Schedule):
    """Equal steps, one token after the other: the log-confidence of a candidate falls by `strength` times its attention to the
    doubtful tokens chosen before it in this forward, in units of uniform attention.
    """

    watched: Watched
    strength: float = 1.0

    def select(self, state: StepState) -> torch.Tensor:
        """The greedy choice, bool [B, K]."""
        attention = self.watched.attention * self.watched.attention.shape[-1]  # [B, K, K]
        doubt, count = 1 - state.score.exp(), pace(state)
        chosen = torch.zeros_like(state.open)
        for place in range(int(count.max())):
            discount = (attention * (chosen * doubt)[:, None]).sum(dim=-1)
            value = (state.score - self.strength * discount).masked_fill(chosen | ~state.candidates, -torch.inf)
            best = value.argmax(dim=1, keepdim=True)
            new = (value.gather(1, best) > -torch.inf) & (place < count)[:, None]
            chosen = chosen.scatter(1, best, chosen.gather(1, best) | new)
        return chosen


WATCHED: dict[str, tuple[Callable[[Watched], Schedule], tuple[Filter, ...]]] = {
    "calibrated order": (Calibrated, ()),
    "dependence-aware": (DependenceAware, ()),
    "dependence-aware, phrase veto": (DependenceAware, (PhraseVeto(),)),
}


# --- Answers ---


def canvas_and_steps(profile: Profile) -> tuple[int, list[int]]:
    """L, in one block, and Z = L / 8, L / 4 and L."""
    length, _ = canvas_of(profile)
    return length, list(dict.fromkeys(max(length // share, 1) for share in (8, 4, 1)))


def main_configs(profile: Profile) -> dict[str, SamplerConfig]:
    """The paper's sampler and the phrase veto, "name, Z forwards" -> configuration, with every number of forwards."""
    length, steps = canvas_and_steps(profile)
    ways = {BASE: (), OURS: (PhraseVeto(),)}
    return {f"{name}, {z} forwards": SamplerConfig(length, length, z, filters=f) for z in steps for name, f in ways.items()}


def other_configs(profile: Profile) -> dict[str, SamplerConfig]:
    """What needs no look into the network, with few forwards: the veto of neighbors alone, and the soft window."""
    length, steps = canvas_and_steps(profile)
    ways = {"linear, duplicate veto": {"filters": (DuplicateVeto(),)}, "soft window": {"schedule": SoftWindow()}}
    ways["soft window, phrase veto"] = {"schedule": SoftWindow(), "filters": (PhraseVeto(),)}
    return {f"{name}, {z} forwards": SamplerConfig(length, length, z, **how) for z in steps[:-1] for name, how in ways.items()}


def oracle_ways() -> dict[str, dict]:
    """What can be asked of the oracle of `studies.markov`, as options of `SamplerConfig`."""
    return {BASE: {}, OURS: {"filters": (PhraseVeto(),)}, "soft window": {"schedule": SoftWindow()}}


def keep_answers(source: Path, profile: Profile, configs: Mapping[str, SamplerConfig], folder: Path) -> None:
    """Copy the answers of notebook 32 (the folder `source`) by these configurations to where `ask_model` finds them."""
    known = {config: place for place, config in enumerate(plain_configs(table5_settings(profile), profile.describe).values())}
    folder.mkdir(parents=True, exist_ok=True)
    for place, config in enumerate(configs.values()):
        for file in source.glob(f"{known[config]:02d}-seed*.jsonl") if config in known else ():
            shutil.copyfile(file, folder / file.name.replace(f"{known[config]:02d}", f"{place:02d}", 1))


def ask_watched(profile: Profile, answerer: Answerer, asked: Mapping[int, Sequence[Example]]) -> pd.DataFrame:
    """The schedules of WATCHED with few forwards, as rows of `generation.ask_all`; real requests have no score."""
    length, steps = canvas_and_steps(profile)
    model, frames = answerer.model, []
    rows_at_once = max(1, 50 * 128 // model.config.text_config.hidden_size)  # attention takes the memory
    kept = model.model.language_model.config._attn_implementation
    model.set_attn_implementation("eager")  # the kernel that returns attention
    for name, (make, filters) in WATCHED.items():
        for z in steps[:-1]:
            for seed, examples in asked.items():
                rows = []
                for start in range(0, len(examples), rows_at_once):
                    batch = examples[start : start + rows_at_once]
                    watched = Watched(answerer, batch, attention=make is DependenceAware)
                    config = model.settings(SamplerConfig(length, length, z, schedule=make(watched), filters=filters))
                    ids = {"mask_token_id": model.config.mask_token_id, "fill_token_id": model.config.fill_token_id}
                    output = sample(watched, watched.inputs["input_ids"], config, **ids)
                    rows += [answer.to_dict() for answer in answerer.answers_of(batch, output)]
                frames.append(measured(rows, examples).assign(setting=f"{name}, {z} forwards", seed=seed))
    model.set_attn_implementation(kept)
    return pd.concat(frames, ignore_index=True)


# --- Reading the answers ---


def with_sentences(items: pd.DataFrame, asked: Mapping[int, Sequence[Example]]) -> pd.DataFrame:
    """The items with `whole_sentences`: the percentage of an answer's sentences that the training descriptions of phantoms hold
    word for word. The scores of facts do not see a broken sentence. NaN for real requests.
    """
    known = training_sentences()
    drawn = all("scene" in example.meta for examples in asked.values() for example in examples)
    shares = [
        100 * np.mean([s in known for s in sentences(text)]) if drawn and sentences(text) else np.nan for text in items["text"]
    ]
    return items.assign(**{SENTENCES: shares})


@cache
def training_sentences() -> set[str]:
    """All sentences of TRAINING_TEXTS descriptions of phantoms."""
    return {sentence for example in description_set("train", TRAINING_TEXTS) for sentence in sentences(example.answer)}


def sentences(text: str) -> list[str]:
    """The sentences of a text in lower case, without their ends."""
    return [part.strip().lower() for part in text.replace(":", ".").split(".") if part.strip()]


def front_points(items: pd.DataFrame, asked: Mapping[int, Sequence[Example]]) -> pd.DataFrame:
    """For the table and the figure: a row per way and number of forwards, and the references, with `change` against linear.

    Columns: way, steps, forwards, n; score, repeated_share, adjacent_duplicates, whole_sentences (means in percent; the
    references have no score), and for each `_gap`, `_low`, `_high`: the paired difference, over the images that both answered.
    """
    metrics, rows = ("score", *REPETITION, SENTENCES), []
    value = means(summarize_answers(items, (*metrics, "forwards")), (*metrics, "forwards"))
    for setting in items["setting"].unique():
        way, steps = setting.removesuffix(" forwards").rsplit(", ", 1)
        row = {"way": way, "steps": int(steps), "forwards": value.loc[setting, "forwards"]}
        row["n"] = int((items["setting"] == setting).sum())
        for metric in metrics:
            row[metric] = value.loc[setting, metric]
            if way != BASE:
                gap = change(items, metric, f"{BASE}, {steps} forwards", setting)
                row |= {f"{metric}_gap": gap.value, f"{metric}_low": gap.low, f"{metric}_high": gap.high}
        rows.append(row)
    examples = [example for group in asked.values() for example in group]
    texts = [measure_answer({"text": example.answer}) for example in examples]
    natural = {"repeated_share": np.mean([text["repeated_share"] for text in texts])}
    natural["adjacent_duplicates"] = 100 * np.mean([text["adjacent_duplicates"] for text in texts])
    whole = with_sentences(pd.DataFrame({"text": [example.answer for example in examples]}), asked)
    rows.append({"way": TEXT, "n": len(texts)} | natural | {SENTENCES: whole[SENTENCES].mean()})
    return pd.DataFrame(rows)


def front_table(points: pd.DataFrame, score: str) -> pd.DataFrame:
    """`front_points` to read; `score` names the score."""
    rows = []
    for line in points.to_dict("records"):
        row = {"way": line["way"], "Z": "" if np.isnan(line["steps"]) else int(line["steps"]), "n": line["n"]}
        labels = {name: f"{words} (%)" for name, words in REPETITION.items()} | {SENTENCES: "whole sentences (%)"}
        for metric, label in {"score": score, **labels}.items():
            row[label] = line[metric]
            gap = Estimate(*(line.get(f"{metric}_{end}", np.nan) for end in ("gap", "low", "high")))
            row[f"{label}, against linear"] = "" if np.isnan(gap.value) else gap.cell("+.1f")
        rows.append(row)
    return pd.DataFrame(rows).round(1)


def targets(points: pd.DataFrame, way: str = OURS) -> str:
    """Per number of forwards: does `way` halve both repetitions of the linear schedule and keep the score?

    The score is kept if the lower end of the paired 95 % interval is at least -MARGIN.
    """
    lines = []
    for steps, part in points[points["steps"].notna()].groupby("steps"):
        by = part.set_index("way")
        ours, base, said = by.loc[way], by.loc[BASE], []
        for metric, words in REPETITION.items():
            halved = "halved" if ours[metric] <= HALF * base[metric] else "not halved"
            halved = halved if base[metric] else "nothing to halve"
            said.append(f"{words} {base[metric]:.2f} -> {ours[metric]:.2f} % ({halved})")
        gap = Estimate(ours["score_gap"], ours["score_low"], ours["score_high"])
        kept = NOT_MEASURED if np.isnan(gap.low) else "not shown to be kept"
        kept = f"kept within {MARGIN:g} points" if gap.low >= -MARGIN else kept
        lines.append(f"Z = {steps:.0f}: {'; '.join(said)}; score {gap.cell('+.1f')}: {kept}; n = {int(ours['n'])}")
    return "\n".join(lines)


def veto_effects(profile: Profile) -> list[tuple[str, str, str, str, str]]:
    """The phrase veto against Algorithm 1, for `effects.claimed_effects`."""
    steps, metrics = canvas_and_steps(profile)[1], ("score", *REPETITION, SENTENCES)
    ends = {f"phrase veto, {z} forwards": (f"{BASE}, {z} forwards", f"{OURS}, {z} forwards") for z in steps}
    return [(name, metric, *pair, "") for name, pair in ends.items() for metric in metrics]
