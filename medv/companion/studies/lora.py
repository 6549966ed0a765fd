"""LoRA or full fine-tuning (notebook 31): stage 3 from one stage-2 model, at several sizes of the training set.

Every arm sees the same questions in the same order under the same noise for the same number of steps, and is asked the same
test questions; only what learns, and the learning rate, differ. The paper tunes all weights and does not compare the two.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from medv.checkpoints.bundled import load_model
from medv.companion.studies.node import Node
from medv.companion.studies.training_stages import SENTENCE
from medv.companion.studies.trials import as_rows, difference_rows, judged, run_trials
from medv.companion.studies.vqa_study import sampler_config, summarize, vqa_study
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.intervals import NOT_MEASURED, span, verdict
from medv.phantoms.sets import instruct_set
from medv.profiles import Profile
from medv.training.collate import Collator, Encoder
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe, attach_lora, freeze_except
from medv.training.stages import run_stage
from medv.training.stream import TrainingStream

NODES = (
    Node(
        "lora",
        "31_lora_vs_full.ipynb",
        "LoRA or full fine-tuning",
        needs=("models/stage2",),
        makes=("trials/lora_vs_full",),
        results=("lora_vs_full", "table_lora_vs_full"),
        heavy=True,
    ),
)

FULL, LORA, ALL_RANKS = "full", "LoRA", "LoRA, all ranks"
SCORES = ["closed_accuracy", "open_recall", "score"]


@dataclass(frozen=True)
class LoraPlan:
    """sizes: training questions; steps: optimizer steps at each size; rates: learning rate by rank, 0 = full fine-tuning;
    questions: of the test set; padded_steps: of stage 2 before all arms, see `padded_start`. alpha is twice the rank.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    rates: Mapping[int, float]
    seeds: tuple[int, ...]
    questions: int
    padded_steps: int = 0


_TINY_RATES = {0: 1e-3, 2: 6e-3, 8: 3e-3, 32: 1.5e-3}
PLANS = {
    "tiny": LoraPlan((64, 256, 1024), (90, 90, 90), _TINY_RATES, (0, 1, 2), 200, padded_steps=100),
    "smoke": LoraPlan((8, 16), (1, 2), {0: 1e-3, 2: 1e-3}, (0, 1), 8, padded_steps=1),
    "small": LoraPlan((256, 1024), (112, 336), {0: 1e-4, 8: 1e-3, 32: 5e-4}, (0, 1, 2), 300, padded_steps=100),
    "paper": LoraPlan((112, 448, 1792), (56, 112, 448), {0: 1e-5, 8: 2e-4, 16: 2e-4, 64: 1e-4}, (0, 1, 2), 451),
}
"""Sizes of the comparison by profile. The rates come from few short runs on validation questions (`tiny`) or are guesses."""


def plan_of(profile: Profile) -> LoraPlan:
    """The plan of a profile, with no more seeds than the profile has on this machine."""
    plan = PLANS[profile.name]
    return plan if profile.towers == "bundled" else replace(plan, seeds=profile.seeds)


@dataclass(frozen=True)
class LoraTrial:
    """One training: rank 0 is full fine-tuning."""

    rank: int
    size: int
    steps: int
    seed: int
    learning_rate: float
    questions: int


def arm_of(rank: int) -> str:
    """The name of an arm: "full" or "LoRA r = 8"."""
    return f"{LORA} r = {rank}" if rank else FULL


def recipe_of(rank: int) -> LoraRecipe | None:
    """The adapters of an arm; None for full fine-tuning."""
    return LoraRecipe(rank=rank, alpha=2 * rank) if rank else None


def trials_of(plan: LoraPlan) -> dict[str, LoraTrial]:
    """All trials by name, seed by seed."""
    return {
        f"{'lora' if rank else 'full'}{rank or ''}-n{size}-seed{seed}": LoraTrial(rank, size, steps, seed, rate, plan.questions)
        for seed in plan.seeds
        for size, steps in zip(plan.sizes, plan.steps, strict=True)
        for rank, rate in plan.rates.items()
    }


def drawn(train: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` training examples of a seed; a larger set holds the smaller ones."""
    if size > len(train):
        raise ValueError(f"a training set of {size} was asked for, but there are {len(train)} examples: lower the sizes")
    order = np.random.default_rng([seed, 0x10A4]).permutation(len(train))
    return [train[index] for index in order[:size]]


def padded_start(profile: Profile, plan: LoraPlan, folder: Path, init: Path) -> Path:
    """Where all arms begin: `init`, or with `padded_steps` that model after as many steps of stage 2 with padded dialogues.

    The small profiles never score end-of-text before stage 3. Full fine-tuning would learn that token in its embedding, which
    LoRA cannot reach, and the comparison would be about one token. The reference pads with it from the first stage on.
    """
    if not plan.padded_steps:
        return init
    recipe = profile.stages["instruct"]
    size = plan.padded_steps * recipe.batch_size
    recipe = replace(recipe, samples=size, epochs=1, padding="fixed:32")
    examples = instruct_set("train", size, seed=1, image_size=profile.model.image_size)
    chosen = replace(profile, stages=profile.stages | {"instruct": recipe})
    run_stage("instruct", chosen, folder / "start", RunOptions(quiet=True), init=init, examples=examples)
    shutil.rmtree(folder / "start" / "checkpoints", ignore_errors=True)
    return folder / "start"


def compare_lora(
    profile: Profile,
    plan: LoraPlan,
    folder: Path,
    init: Path,
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    quiet: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and ask every arm at every size and seed.

    Returns the answers (arm, size and the columns of `vqa_study`, with `score`, the metric of the question's own type) and one
    row of facts a trial (arm, size, seed, trainable_parameters, checkpoint_bytes, train_loss). Results in `folder` are kept.
    """
    asked = test[: plan.questions]

    def work(trial: LoraTrial, scratch: Path) -> dict[str, Any]:
        recipe, rate = profile.stages["vqa"], trial.learning_rate
        epochs = trial.steps * recipe.batch_size / trial.size
        recipe = replace(recipe, learning_rate=rate, samples=trial.size, epochs=epochs)
        chosen = replace(profile, stages=profile.stages | {"vqa": recipe})
        examples, lora = drawn(train, trial.size, trial.seed), recipe_of(trial.rank)
        options = RunOptions(seed=trial.seed, lora=lora, checkpoints=False, quiet=True)
        facts = run_stage("vqa", chosen, scratch, options, init=init, examples=examples)
        config = sampler_config(profile.answer, seed=trial.seed)
        how = {"seed": trial.seed, "conditions": ["model"], "batch_size": profile.answer.batch_size, "quiet": True}
        items = vqa_study(Answerer.load(scratch), train, asked, config, **how)
        stored = (scratch / "adapter" if lora else scratch).glob("*.safetensors")
        kept = {"trainable_parameters": facts["trainable_parameters"], "train_loss": facts.get("loss")}
        return {**kept, "checkpoint_bytes": sum(file.stat().st_size for file in stored), "items": as_rows(items)}

    trials, facts, frames = trials_of(plan), [], []
    for name, result in run_trials(folder, trials, work, quiet=quiet).items():
        trial = trials[name]
        where = {"arm": arm_of(trial.rank), "size": trial.size, "seed": trial.seed, "steps": trial.steps}
        frames.append(pd.DataFrame(result.pop("items")).assign(**where))
        facts.append(where | result)
    return scored(pd.concat(frames, ignore_index=True)), pd.DataFrame(facts)


def scored(items: pd.DataFrame) -> pd.DataFrame:
    """With the column `score`: accuracy of a closed question, recall of an open one."""
    return items.assign(score=items["closed_accuracy"].astype(float).fillna(items["open_recall"].astype(float)))


def curve_of(items: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval (seeds and questions drawn anew) of each arm at each size: arm, size, metric, value, low, high, n,
    seeds.
    """
    frames = []
    for (arm, size), part in items.groupby(["arm", "size"], sort=False):
        frames.append(summarize(part.assign(condition=arm), metrics=SCORES).assign(arm=arm, size=size))
    return pd.concat(frames, ignore_index=True)[["arm", "size", "metric", "value", "low", "high", "n", "seeds"]]


def gaps(items: pd.DataFrame) -> pd.DataFrame:
    """Full fine-tuning minus LoRA at each size, by rank and over all ranks: size, against, value, low, high, n, seeds.

    Score over all questions, paired by seed and question. The mean over ranks is not a choice made after looking.
    """
    rows = []
    for size, part in items.groupby("size"):
        part = part[["arm", "seed", "id", "score"]].rename(columns={"arm": "condition"})
        lora = part[part["condition"] != FULL]
        mean = lora.groupby(["seed", "id"], as_index=False)["score"].mean().assign(condition=ALL_RANKS)
        part = pd.concat([part, mean], ignore_index=True)
        for name in dict.fromkeys(part["condition"]):
            if name != FULL:
                summary = judged(difference_rows(part, FULL, name, ["score"]), ["score"]).iloc[0]
                rows.append({"size": size, "against": name} | summary[["value", "low", "high", "n", "seeds"]].to_dict())
    return pd.DataFrame(rows)


def conclusion(gap: pd.DataFrame) -> str:
    """Whether "LoRA wins when data are scarce, full when there are enough" appears, computed from `gaps`.

    One line for each size, with the verdict of each rank beside that of all ranks, and one line for the claim.
    """
    said = {"higher": "full wins", "lower": "LoRA wins"}
    gap = gap.assign(said=[said.get(v, v) for v in map(verdict, gap["low"], gap["high"])]).sort_values("size", kind="stable")
    lines, wins = [], []
    for size, part in gap.groupby("size"):
        mean = part[part["against"] == ALL_RANKS].iloc[0]
        ranks = "; ".join(f"{row.against}: {row.said}" for row in part[part["against"] != ALL_RANKS].itertuples())
        points = span(mean["value"], mean["low"], mean["high"], form="+.1f")
        lines.append(f"{size} questions, full minus LoRA over all ranks, points: {points}: {mean['said']} ({ranks})")
        wins.append(mean["said"])
    halves = [("LoRA wins", " at the smallest size", wins[0]), ("full wins", " at the largest", wins[-1])]
    words = [{who: "appears", NOT_MEASURED: NOT_MEASURED}.get(said, "does not appear") for who, _, said in halves]
    verdicts = ", ".join(f"{who}{where}: {word}" for (who, where, _), word in zip(halves, words, strict=True))
    ranks = gap[gap["against"] != ALL_RANKS].groupby("size")["said"].nunique().max()
    return "\n".join([*lines, f"Over all ranks, {verdicts}." + (" But the ranks disagree." if ranks > 1 else "")])


# --- What an arm costs ---


def costs(
    profile: Profile, plan: LoraPlan, init: Path, train: Sequence[Example], facts: pd.DataFrame, *, repeats: int = 8
) -> pd.DataFrame:
    """One row per arm: trainable parameters, peak_memory_bytes, step_seconds (of the fastest step), checkpoint_bytes.

    Memory on CUDA is the allocator's peak; elsewhere weights, gradients, Adam's two moments and the activations that the
    backward pass keeps are counted, which is a lower bound of the peak.
    """
    rows = []
    for rank in plan.rates:
        network, reader = load_model(init)
        network.config.loss_normalization = profile.stages["vqa"].normalization
        freeze_except(network, profile.stages["vqa"].trains)
        lora = recipe_of(rank)
        learner = (attach_lora(network, lora) if lora else network).train()
        batch = _first_batch(profile, reader, train)
        known = facts[facts["arm"] == arm_of(rank)].iloc[0]
        measured = step_cost(learner, batch, repeats=repeats)
        stored = {"trainable_parameters": known["trainable_parameters"], "checkpoint_bytes": known["checkpoint_bytes"]}
        rows.append({"arm": arm_of(rank)} | stored | measured)
    return pd.DataFrame(rows)


def _first_batch(profile: Profile, reader, train: Sequence[Example]) -> dict[str, torch.Tensor]:
    recipe = profile.stages["vqa"]
    encode = Encoder(reader, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length)
    examples = train[: recipe.batch_size]
    stream = TrainingStream(examples, encode, seed=0, batch_size=len(examples), steps=1, times=recipe.times)
    return Collator(reader.special, padding=recipe.padding)([stream[i] for i in range(len(stream))])


def step_cost(network: torch.nn.Module, batch: dict[str, torch.Tensor], *, repeats: int = 8) -> dict[str, float]:
    """Wall time of the fastest optimizer step and its peak memory, as `costs` says; the weights are not kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, batch = network.to(device), {name: tensor.to(device) for name, tensor in batch.items()}
    learned = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(repeats + 2):  # two to warm up
        started = time.perf_counter()
        if number:
            loss = network(**batch).loss
        else:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss = network(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    size = sum(p.numel() * p.element_size() for p in learned)
    counted = sum(p.numel() * p.element_size() for p in network.parameters()) + 3 * size + sum(kept.values())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else counted
    return {"peak_memory_bytes": peak, "step_seconds": min(seconds[2:])}


def cost_table(curve: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """Arms as rows: what they cost and the score at each size as "mean [low, high]"."""
    memory = "peak memory (MB)" if torch.cuda.is_available() else "memory, counted (MB)"
    rows = []
    for row in cost.itertuples():
        cells = {
            "arm": row.arm,
            "trained (thousands)": row.trainable_parameters / 1e3,
            memory: row.peak_memory_bytes / 1e6,
            "step (ms)": 1e3 * row.step_seconds,
            "checkpoint (MB)": row.checkpoint_bytes / 1e6,
        }
        part = curve[(curve["arm"] == row.arm) & (curve["metric"] == "score")]
        scores = {f"score, n = {p.size} (%)": f"{p.value:.1f} [{p.low:.1f}, {p.high:.1f}]" for p in part.itertuples(name="P")}
        rows.append(cells | scores)
    return pd.DataFrame(rows)


def levels(before: Answerer, profile: Profile, train: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """What needs no stage 3, in percent: the model before it, answering in sentences, and the question-only look-up."""
    spec = max(SENTENCE.like(profile.answer), profile.answer, key=lambda spec: spec.gen_length)
    conditions = {"before stage 3": "model", "question only": "question only"}
    how = {"conditions": [*conditions.values()], "batch_size": spec.batch_size, "quiet": True}
    items = scored(vqa_study(before, train, test, sampler_config(spec), **how))
    return {name: float(items[items["condition"] == kind]["score"].mean()) for name, kind in conditions.items()}
