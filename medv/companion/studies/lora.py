"""LoRA or full fine-tuning (notebook 31): stage 3 from one stage-2 model, at several sizes of the training set.

Every arm sees the same questions in the same order under the same noise for the same number of steps, and is asked the same
test questions; only what learns, and the learning rate, differ. The paper tunes all weights and does not compare the two.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from medv.artifacts import SPEED
from medv.checkpoints.bundled import load_model
from medv.companion.studies.machine import Machine
from medv.companion.studies.node import Node
from medv.companion.studies.summaries import differences, summarize
from medv.companion.studies.training_stages import sentence_spec
from medv.companion.studies.trials import as_rows, run_trials
from medv.companion.studies.vqa_study import sampler_config, vqa_study
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.intervals import NOT_MEASURED, Estimate
from medv.phantoms.sets import instruct_set
from medv.profiles import LoraPlan, Profile
from medv.training.collate import Collator, Encoder
from medv.training.examples import PHANTOMS, TrainingData
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe, attach_lora, freeze_except
from medv.training.stages import FINISHED, run_stage
from medv.training.stream import TrainingStream

NODE = Node(
    "lora",
    "31_lora_vs_full.ipynb",
    "LoRA or full fine-tuning",
    needs=("models/stage2",),
    makes=("trials/lora_vs_full",),
    results=("lora_vs_full", "table_lora_vs_full", "effects_lora_vs_full"),
    reads=("vqa_rad|slake|pathvqa",),
    heavy=True,
)

DEFAULT = Machine()
FULL, LORA, ALL_RANKS = "full", "LoRA", "LoRA, all ranks"
SCORES = ["closed_accuracy", "open_recall", "score"]


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


def padded_start(profile: Profile, plan: LoraPlan, folder: Path, init: Path) -> Path:
    """The start of all arms: `init`, or with `padded_steps` that model after as many steps of stage 2 with padded dialogues.

    The small profiles never score end-of-text before stage 3. Full fine-tuning would learn it in the embedding, which LoRA
    cannot change, and the comparison would be about one token. The reference pads with it from the first stage on.
    """
    if not plan.padded_steps:
        return init
    size = plan.padded_steps * profile.stages["instruct"].batch_size
    chosen = profile.with_recipe("instruct", samples=size, epochs=1, padding="fixed:32")
    examples = instruct_set("train", size, seed=1, image_size=profile.model.image_size)
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
    source: TrainingData = PHANTOMS,
    machine: Machine = DEFAULT,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and ask every arm at every size and seed. train: the training questions of `source`.

    Returns the answers (arm, size and the columns of `vqa_study`, with `score`, the metric of the question's own type) and one
    row of facts a trial (arm, size, seed, trainable_parameters, checkpoint_bytes, train_loss). Results in `folder` are kept.
    """
    asked = test[: plan.questions]

    def work(trial: LoraTrial, scratch: Path) -> dict[str, Any]:
        epochs = trial.steps * profile.stages["vqa"].batch_size / trial.size
        chosen = profile.with_recipe("vqa", learning_rate=trial.learning_rate, samples=trial.size, epochs=epochs)
        lora, how = recipe_of(trial.rank), {"seed": trial.seed, "init": init, "data": source, "quiet": True}
        subset = (len(train), trial.size, trial.seed)
        facts = machine.train("vqa", chosen, scratch, lora=lora, subset=subset, checkpoints=False, **how)
        config = sampler_config(profile.answer, seed=trial.seed)
        how = {"seed": trial.seed, "conditions": ["model"], "batch_size": profile.answer.batch_size, "quiet": True}
        items = vqa_study(Answerer.load(scratch, dtype=profile.dtype), train, asked, config, **how)
        stored = (scratch / "adapter" if lora else scratch).glob("*.safetensors")
        kept = {"trainable_parameters": facts["trainable_parameters"], "train_loss": facts.get("loss")}
        speed = json.loads((scratch / SPEED).read_text(encoding="utf-8"))
        steps = json.loads((scratch / FINISHED).read_text(encoding="utf-8"))["steps"]
        seconds = sum(row["seconds"] for row in speed["rows"])
        kept |= {"peak_memory_bytes": speed["total"].get("peak_bytes", np.nan), "step_seconds": seconds / steps}
        return {**kept, "checkpoint_bytes": sum(file.stat().st_size for file in stored), "items": as_rows(items)}

    trials, facts, frames = trials_of(plan), [], []
    for name, result in run_trials(folder, trials, work).items():
        trial = trials[name]
        where = {"arm": arm_of(trial.rank), "size": trial.size, "seed": trial.seed, "steps": trial.steps}
        frames.append(pd.DataFrame(result.pop("items")).assign(**where))
        facts.append(where | result)
    return scored(pd.concat(frames, ignore_index=True)), pd.DataFrame(facts)


def scored(items: pd.DataFrame) -> pd.DataFrame:
    """With the column `score`: accuracy of a closed question, recall of an open one."""
    return items.assign(score=items["closed_accuracy"].astype(float).fillna(items["open_recall"].astype(float)))


def curve_of(items: pd.DataFrame) -> pd.DataFrame:
    """`summarize` of each arm at each size: arm, size, metric, value, low, high, n, seeds."""
    parts = items.groupby(["arm", "size"], sort=False)
    frames = [summarize(part, SCORES, by="arm").assign(size=size) for (_, size), part in parts]
    return pd.concat(frames, ignore_index=True)[["arm", "size", "metric", "value", "low", "high", "n", "seeds"]]


def gaps(items: pd.DataFrame) -> pd.DataFrame:
    """Full fine-tuning minus each rank and minus the mean of all, by size: size, against, value, low, high, n, seeds."""
    rows = []
    for size, part in items.groupby("size"):
        part = part[["arm", "seed", "id", "score"]].rename(columns={"arm": "condition"})
        lora = part[part["condition"] != FULL]
        mean = lora.groupby(["seed", "id"], as_index=False)["score"].mean().assign(condition=ALL_RANKS)
        part = pd.concat([part, mean], ignore_index=True)
        for name in dict.fromkeys(part["condition"]):
            if name != FULL:
                found = differences(part, FULL, name, ["score"]).iloc[0]
                rows.append({"size": size, "against": name} | found[["value", "low", "high", "n", "seeds"]].to_dict())
    return pd.DataFrame(rows)


def conclusion(gap: pd.DataFrame) -> str:
    """Whether "LoRA wins when data are scarce, full when there are enough" appears in `gaps`, with a line per size."""
    said = [Estimate.of(row).verdict("full wins", "LoRA wins") for row in gap.itertuples()]
    gap = gap.assign(said=said).sort_values("size", kind="stable")
    lines, wins = [], []
    for size, part in gap.groupby("size"):
        mean = part[part["against"] == ALL_RANKS].iloc[0]
        ranks = "; ".join(f"{row.against}: {row.said}" for row in part[part["against"] != ALL_RANKS].itertuples())
        points = Estimate.of(mean).cell("+.1f")
        lines.append(f"{size} questions, full minus LoRA over all ranks, points: {points}: {mean['said']} ({ranks})")
        wins.append(mean["said"])
    halves = [("LoRA wins", " at the smallest size", wins[0]), ("full wins", " at the largest", wins[-1])]
    words = [{who: "appears", NOT_MEASURED: NOT_MEASURED}.get(said, "does not appear") for who, _, said in halves]
    verdicts = ", ".join(f"{who}{where}: {word}" for (who, where, _), word in zip(halves, words, strict=True))
    said_of_ranks = gap[gap["against"] != ALL_RANKS].groupby("size")["said"]
    disagree = any({"full wins", "LoRA wins"} <= {*said} for _, said in said_of_ranks)
    return "\n".join([*lines, f"Over all ranks, {verdicts}." + (" But the ranks disagree." if disagree else "")])


# --- What an arm costs ---


def costs(
    profile: Profile, plan: LoraPlan, init: Path, train: Sequence[Example], facts: pd.DataFrame, *, repeats: int = 8
) -> pd.DataFrame:
    """One row per arm: trainable parameters, peak_memory_bytes, step_seconds (of the fastest step), checkpoint_bytes. Where the
    model has the released size, memory and time are those that its own trainings measured.

    Memory on CUDA is the allocator's peak; elsewhere a lower bound of it: weights, gradients, Adam's two moments and the
    activations that the backward pass keeps.
    """
    rows, recipe = [], profile.stages["vqa"]
    if profile.towers == "given":
        largest = facts[facts["size"] == facts["size"].max()].groupby("arm", sort=False)
        columns = ["trainable_parameters", "checkpoint_bytes", "peak_memory_bytes", "step_seconds"]
        return largest[columns].first().reset_index()
    examples = train[: recipe.batch_size]
    for rank in plan.rates:
        network, processor = load_model(init)
        network.config.loss_normalization = recipe.normalization
        freeze_except(network, recipe.trains)
        lora = recipe_of(rank)
        learner = (attach_lora(network, lora) if lora else network).train()
        encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length)
        stream = TrainingStream(examples, encode, seed=0, batch_size=len(examples), steps=1, times=recipe.times)
        batch = Collator(processor.special, padding=recipe.padding)([stream[i] for i in range(len(stream))])
        known = facts[facts["arm"] == arm_of(rank)].iloc[0]
        measured = step_cost(learner, batch, repeats=repeats)
        rows.append(known[["arm", "trainable_parameters", "checkpoint_bytes"]].to_dict() | measured)
    return pd.DataFrame(rows)


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
        scores = {f"score, n = {row['size']} (%)": Estimate.of(row).cell() for _, row in part.iterrows()}
        rows.append(cells | scores)
    return pd.DataFrame(rows)


def levels(before: Answerer, profile: Profile, train: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """Baselines in percent: the model before stage 3, which answers in sentences, and the question-only look-up."""
    spec = sentence_spec(profile)
    conditions = {"before stage 3": "model", "question only": "question only"}
    how = {"conditions": [*conditions.values()], "batch_size": spec.batch_size, "quiet": True}
    items = scored(vqa_study(before, train, test, sampler_config(spec), **how))
    return {name: float(items[items["condition"] == kind]["score"].mean()) for name, kind in conditions.items()}
