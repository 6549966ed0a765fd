"""From causal to diffusion (notebook 14): a tower adapted on text, what it writes before and after, and the 2 x 2 x 2 ablation
of attention, alignment and weighting.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from medv.artifacts import write_json
from medv.checkpoints.assembly import token_ids
from medv.checkpoints.bundled import bundled
from medv.checkpoints.loading import load_tokenizer
from medv.companion.studies.node import Node
from medv.companion.studies.summaries import summarize, with_verdicts
from medv.companion.studies.trials import run_trials
from medv.companion.studies.vqa_study import sampler_config
from medv.companion.towers.adapt import ATTENTION, MADE_BY, WEIGHTS, AdaptRecipe, adapt, half_on, held_out_losses, load_tower
from medv.companion.towers.text import Writing, pack, write_text_of
from medv.data.chat import SpecialTokens
from medv.data.texts import Document, read_documents, split_documents
from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import sample
from medv.evaluation.text import repetition
from medv.intervals import Estimate
from medv.model.devices import device_named
from medv.ownership import reserve
from medv.phantoms.sets import text_set
from medv.profiles import PROFILES, AdaptPlan, Profile
from medv.training.stages import towers

NODE = Node(
    "adaptation",
    "14_from_causal_to_diffusion.ipynb",
    "From causal to diffusion",
    makes=("trials/adaptation",),
    results=("adaptation", "table_adaptation", "effects_adaptation"),
    heavy=True,
    plan="adaptation",
)

HELD_ROWS = 64
OPENING = 24  # tokens of a text without a prompt that are given
CONTINUE = SamplerConfig(gen_length=64, block_length=32, steps=64)


def adapt_on_text(
    language: Path,
    out: Path,
    recipe: AdaptRecipe,
    *,
    text: str | None = None,
    writing: Writing | None = None,
    self_tokens: int = 2_000_000,
    continuations: int = 20,
    seed: int = 0,
    device: str | torch.device = "cpu",
    quiet: bool = False,
    **options,
) -> dict:
    """Adapt a tower on `text`, or on `self_tokens` tokens that it writes by `writing` into `<out>-text`. Returns the facts.

    `continuations.json` in `out` holds its continuations of different held-out openings before and after. `options`: `adapt`'s.
    """
    if (text is None) == (writing is None):
        raise ValueError("give either a text to adapt on or let the tower write its own, one of the two")
    written = {}
    with reserve(out, MADE_BY, inputs=[language]):  # a folder that is not ours is refused before hours of writing
        if writing is not None:
            text = out.with_name(f"{out.name}-text")
            written = {"written": write_text_of(language, text, self_tokens, writing, device=device, quiet=quiet)}
        documents, held_out = split_documents(read_documents(text, written["written"]["files"] if written else None))
    tokenizer = load_tokenizer(language)
    rows = pack(documents, tokenizer, recipe.length, seed=seed)
    held_rows = pack(held_out, tokenizer, recipe.length, name="held-out part of the text")[:HELD_ROWS]
    facts = adapt(language, rows, held_rows, recipe, out, seed=seed, device=device, quiet=quiet, **options)
    if facts and continuations and not (out / "continuations.json").exists():
        asked = list({document.prompt or document.text: document for document in held_out}.values())[:continuations]
        towers = {"before": language, "after": out}
        texts = {name: continue_documents(folder, asked, device=device) for name, folder in towers.items()}
        given = [{"prompt": document.prompt, "written": document.text} for document in asked]
        answers = [dict(zip(texts, pair, strict=True)) for pair in zip(*texts.values(), strict=True)]
        write_json(out / "continuations.json", [given | answer for given, answer in zip(given, answers, strict=True)])
    return facts | written


def continue_documents(
    folder: Path, documents: Sequence[Document], *, device: str | torch.device = "cpu", config: SamplerConfig = CONTINUE
) -> list[str]:
    """A tower's continuation, as a diffusion model, of the prompt of each document, or of its first words."""
    tower = load_tower(folder, dtype=half_on(device), causal=False).to(device)
    tokenizer = load_tokenizer(folder)
    openings = []
    for document in documents:
        ids = tokenizer.encode(document.opening() if document.prompt else document.text, add_special_tokens=False)
        openings.append(ids if document.prompt else ids[:OPENING])
    known = token_ids(SpecialTokens.of(tokenizer))
    fill, width = known["fill_token_id"], max(len(ids) for ids in openings)
    prompt = torch.tensor([[fill] * (width - len(ids)) + list(ids) for ids in openings], device=tower.device)  # [B, P]
    seen = torch.tensor([[0] * (width - len(ids)) + [1] * (len(ids) + config.gen_length) for ids in openings])
    seen = seen.to(tower.device)  # [B, P + L]
    positions = (seen.cumsum(dim=1) - 1).clamp_min(0)

    def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        states = tower.model(canvas, attention_mask=seen, position_ids=positions, use_cache=False).last_hidden_state
        return tower.lm_head(states[:, columns])

    config = replace(config, suppress_tokens=tuple(known["suppress_token_ids"]), stop_tokens=tuple(known["stop_token_ids"]))
    output = sample(denoise, prompt, config, mask_token_id=known["mask_token_id"], fill_token_id=fill)
    ids = [row[:length] for row, length in zip(output.sequences.tolist(), output.lengths, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(ids)]


# --- The ablation (notebook 14) ---

FACTORS = {"attention": ("annealed", "at once"), "alignment": ("aligned", "not aligned"), "weights": ("1/t", "uniform")}
"""The three choices; the effect of one is its first value minus its second."""
METRICS = {"cross_entropy": "held-out masked cross-entropy (nats)", "adjacent_duplicates": "adjacent duplicates (%)"}


def plan_of(profile: Profile) -> AdaptPlan:
    """The plan of a profile; raises ValueError for one without a causal tower."""
    if profile.adaptation is None:
        names = ", ".join(name for name, other in PROFILES.items() if other.adaptation)
        raise ValueError(f"profile {profile.name} has no causal tower to adapt: use {names}")
    return profile.adaptation


@dataclass(frozen=True)
class AdaptTrial:
    """One arm, one seed."""

    recipe: AdaptRecipe
    seed: int
    plan: AdaptPlan


def tower_of(profile: Profile, language: str | None) -> Path:
    """The causal tower: the given folder, the bundled one, or the one that `medv towers` fetched."""
    if language:
        return Path(language)
    return bundled("twin_tower") if profile.towers == "bundled" else towers(profile)[0]


def arms_of(plan: AdaptPlan) -> dict[str, AdaptRecipe]:
    """The eight recipes by name: all choices of FACTORS."""
    recipe, arms = AdaptRecipe(**plan.recipe), {}
    for attention, align, weights in product(ATTENTION, (True, False), WEIGHTS):
        words = (attention.replace("_", " "), FACTORS["alignment"][not align], weights)
        arms[", ".join(words)] = replace(recipe, attention=attention, align=align, weights=weights)
    return arms


def documents_of(plan: AdaptPlan, tower: Path, text: str | None, folder: Path) -> tuple[list[Document], list[Document]]:
    """Documents to learn from and held-out ones: of `text`, drawn reports, or what the tower writes to folder/self_text."""
    if text is None and plan.documents:
        return tuple(
            [Document(ex.answer, ex.turns[0].text) for ex in text_set(split, count, seed=1) if len(ex.turns) == 2]
            for split, count in (("train", plan.documents), ("validation", 400))
        )
    if text is None:
        text = folder / "self_text"
        device = device_named()
        write_text_of(tower, text, plan.self_tokens, Writing(512 if device.type == "cuda" else 16), device=device)
    return split_documents(read_documents(text))


def compare_recipes(plan: AdaptPlan, folder: Path, tower: Path, train: Sequence, held_out: Sequence) -> dict[str, Any]:
    """By trial, kept in `folder`: `history`, `rows` (held-out cross-entropy, mean over t) and `texts` (continuations)."""
    tokenizer, device = load_tokenizer(tower), device_named()
    arms, length = arms_of(plan), AdaptRecipe(**plan.recipe).length
    held_rows = pack(held_out, tokenizer, length, name="held-out part of the text")[: plan.held_rows]
    packed = {seed: pack(train, tokenizer, length, seed=seed) for seed in plan.seeds}
    openings, write = held_out[: plan.openings], sampler_config(plan.write)

    def work(trial: AdaptTrial, scratch: Path) -> dict[str, Any]:
        how = {"seed": trial.seed, "device": device, "checkpoints": False, "quiet": True}
        adapt(tower, packed[trial.seed], held_rows, trial.recipe, scratch, **how)
        network = load_tower(scratch, dtype=half_on(device), causal=False).to(device)
        mask = SpecialTokens.of(load_tokenizer(scratch)).mask
        losses = held_out_losses(network, held_rows, mask).mean(dim=1)  # [n]
        texts = continue_documents(scratch, openings, device=device, config=write)
        history = [row for row in json.loads((scratch / "history.json").read_text(encoding="utf-8")) if "eval_loss" in row]
        return {"history": history, "rows": losses.tolist(), "texts": texts}

    trials = {
        f"{number}-seed{seed}": AdaptTrial(recipe, seed, plan)
        for seed in plan.seeds
        for number, recipe in enumerate(arms.values())
    }
    return run_trials(folder, trials, work)


def items_of(plan: AdaptPlan, results: Mapping[str, Mapping]) -> pd.DataFrame:
    """A row per arm, seed and held-out row or text: condition, the FACTORS, seed, id, and the METRICS (or NaN)."""
    frames = []
    for seed in plan.seeds:
        for number, arm in enumerate(arms_of(plan)):
            result = results[f"{number}-seed{seed}"]
            rows = [{"id": f"row {i}", "cross_entropy": loss} for i, loss in enumerate(result["rows"])]
            for i, text in enumerate(result["texts"]):
                share = 100 * repetition(text.split())["adjacent_duplicates"]
                rows.append({"id": f"text {i}", "adjacent_duplicates": share})
            values = dict(zip(FACTORS, arm.split(", "), strict=True))
            frames.append(pd.DataFrame(rows).assign(condition=arm, seed=seed, **values))
    return pd.concat(frames, ignore_index=True)


def curves_of(plan: AdaptPlan, results: Mapping[str, Mapping]) -> pd.DataFrame:
    """Held-out cross-entropy against tokens seen, mean over seeds: arm, tokens, loss."""
    rows = [
        {"arm": arm, "tokens": row["tokens"], "loss": row["eval_loss"]}
        for seed in plan.seeds
        for number, arm in enumerate(arms_of(plan))
        for row in results[f"{number}-seed{seed}"]["history"]
    ]
    return pd.DataFrame(rows).groupby(["arm", "tokens"], sort=False, as_index=False)["loss"].mean()


def arm_table(items: pd.DataFrame, held_out: Sequence[Document]) -> pd.DataFrame:
    """A row per arm, "mean [95 % interval]" of each metric, the best first; the last row is the held-out text itself."""
    summary, rows = summarize(items, list(METRICS)), []
    for arm, part in summary.groupby("condition", sort=False):
        found = part.set_index("metric").reindex(list(METRICS))
        row = dict(zip(FACTORS, arm.split(", "), strict=True)) | {"order": found.loc["cross_entropy", "value"]}
        row |= {title: Estimate.of(found.loc[name]).cell(".2f") for name, title in METRICS.items()}
        rows.append(row | {"seeds": int(found["seeds"].max())})
    table = pd.DataFrame(rows).sort_values("order", kind="stable").drop(columns="order")
    own = np.mean([100 * repetition(document.text.split())["adjacent_duplicates"] for document in held_out])
    last = {"attention": "the text itself", METRICS["adjacent_duplicates"]: f"{own:.2f}"}
    return pd.concat([table, pd.DataFrame([last])], ignore_index=True).fillna("")


def effects(items: pd.DataFrame) -> pd.DataFrame:
    """Each factor's effect, mean over the four pairs of arms: factor, metric, value, low, high, n, seeds, verdict."""
    frames = []
    for factor, sides in FACTORS.items():
        means = items.groupby([factor, "seed", "id"])[list(METRICS)].mean()
        gap = (means.loc[sides[0]] - means.loc[sides[1]]).reset_index()
        frames.append(with_verdicts(gap, list(METRICS)).assign(factor=f"{sides[0]} minus {sides[1]}"))
    table = pd.concat(frames, ignore_index=True)
    return table[["factor", "metric", "value", "low", "high", "n", "seeds", "verdict"]]


def conclusion(table: pd.DataFrame) -> str:
    """A sentence for each effect, computed from `effects`."""
    words = {"lower": "better", "higher": "worse"}
    return "\n".join(
        f"{row.factor}, {METRICS[row.metric]}: {words.get(row.verdict, row.verdict)}, "
        f"{Estimate.of(row).cell('+.3f')}, {row.seeds} seed{'s' * (row.seeds > 1)}"
        for row in table.itertuples()
    )


def sample_of(plan: AdaptPlan, results: Mapping[str, Mapping], held_out: Sequence[Document], count: int = 2) -> str:
    """The first openings and their continuation by every arm of the first seed, to read."""
    lines = []
    for i, document in enumerate(held_out[:count]):
        lines += [f"asked: {document.prompt or document.text[:80]}", f"  {'the text itself':32} {document.text[:160]}"]
        for number, arm in enumerate(arms_of(plan)):
            lines.append(f"  {arm:32} {results[f'{number}-seed{plan.seeds[0]}']['texts'][i] or '(nothing)'}")
    return "\n".join(lines)
