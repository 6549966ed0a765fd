"""The loss of a healthy stage 2 (notebook 15): a band over seeds, for both ways to draw t and every normalization.

One short training of stage 2 per seed and way to draw t. A forward's cross-entropies are weighted in every way of
`medv.diffusion.loss`, so that all normalizations are read from the same forwards; only that of the recipe is trained. Seeds
share the examples and differ in their order and in the noise. The way to draw t is compared by seed: order, and the uniforms
that decide what is masked, are the same. A validation loss at fixed times and masks, before and after, tells whether a training
learned where its own losses scatter too much to tell.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from medv.checkpoints.bundled import load_model
from medv.companion.studies.node import Node
from medv.companion.studies.trials import run_trials
from medv.data.example import Example
from medv.diffusion.corruption import masking_probability
from medv.diffusion.loss import NORMALIZATIONS, token_weights
from medv.intervals import NOT_MEASURED, Estimate, bootstrap
from medv.model.looks import Looks
from medv.model.modeling import IGNORED_LABEL, MedVForMaskedDiffusion, MedVOutput
from medv.model.processing import MedVProcessor
from medv.phantoms.sets import instruct_set
from medv.profiles import Profile, StageRecipe
from medv.training.collate import Collator, Encoder
from medv.training.launch import RunOptions
from medv.training.stages import train_stage
from medv.training.stream import TIMES, ValidationStream

NODE = Node(
    "loss_band",
    "15_loss_band.ipynb",
    "The loss of a healthy stage 2",
    needs=("models/stage1", "models/stage2"),
    makes=("trials/loss_band",),
    results=("loss_band", "table_loss_band"),
    heavy=True,
    plan="band_steps",
)

BATCH = 8  # examples of a step
RATE = 0.3  # of the recipe's learning rate: with the whole of it the validation loss rises over so few steps
POINTS = 15  # windows of a curve
START = 0.2  # the share of a run whose mean loss is the unit of its shape
LOW, HIGH = 0.05, 0.95  # the quantiles over seeds that bound the band
NATS, SHAPE = "nats", "start"
"""The scales of a band: the loss itself, and the loss divided by its own mean over the first START of the steps."""


@dataclass(frozen=True)
class BandTrial:
    """One training of stage 2: times, how t is drawn; `batch_size` examples a step; rate, a share of the recipe's."""

    times: str
    seed: int
    steps: int
    batch_size: int
    rate: float = 1.0


class Recorder:
    """A forward hook: `rows` gets the loss of each forward under every normalization, in nats."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def __call__(self, model: MedVForMaskedDiffusion, _: tuple, inputs: Mapping[str, Any], output: MedVOutput) -> None:
        """Called by torch after a forward with labels [B, T] and t [B]."""
        labels, masked = inputs["labels"], output.masked
        logits = model.lm_head(output.last_hidden_state[masked])  # [M, V]
        losses = F.cross_entropy(logits.float(), labels[masked], reduction="none")  # [M]
        p_mask = masking_probability(inputs["t"], eps=model.config.noise_eps).to(labels.device)
        ways = {name: token_weights(masked, labels != IGNORED_LABEL, p_mask, name) for name in NORMALIZATIONS}
        self.rows.append({name: float((losses * weights).sum()) for name, weights in ways.items()})


def trials_of(profile: Profile) -> dict[str, BandTrial]:
    """All trainings by name, seed by seed; raises ValueError for a profile without such trainings."""
    if profile.band_steps * START < 1:
        raise ValueError(
            f"profile {profile.name} has no short trainings of stage 2, or too short ones: set band_steps, to 5 or more"
        )
    return {
        f"{times}-seed{seed}": BandTrial(times, seed, profile.band_steps, BATCH, RATE)
        for seed in range(profile.band_seeds)
        for times in TIMES
    }


def train_all(profile: Profile, init: Path, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The losses of all trainings from the model `init` (times, seed, step, normalization, loss), and the validation loss
    under the recipe's normalization (times, seed, before, after). `folder` keeps results.
    """
    size = profile.model.image_size
    examples = instruct_set("train", profile.band_steps * BATCH, image_size=size)
    held_out = instruct_set("validation", 2 * BATCH, image_size=size)
    looks = Looks(load_model(init)[1])

    def work(trial: BandTrial, scratch: Path) -> dict[str, Any]:
        shutil.rmtree(scratch, ignore_errors=True)  # a stopped training has lost what was recorded
        return recorded(trial, profile, init, examples, held_out, scratch / "model", looks)

    trials, frames, ends = trials_of(profile), [], []
    for name, result in run_trials(folder, trials, work).items():
        where = {"times": trials[name].times, "seed": trials[name].seed}
        wide = pd.DataFrame(result["losses"]).rename_axis("step").reset_index()
        wide["step"] += 1
        frames.append(wide.melt("step", var_name="normalization", value_name="loss").assign(**where))
        ends.append(where | {"before": result["before"], "after": result["after"]})
    return pd.concat(frames, ignore_index=True), pd.DataFrame(ends)


def recorded(
    trial: BandTrial,
    profile: Profile,
    init: Path,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    looks: Looks | None = None,
) -> dict[str, Any]:
    """Train stage 2 once into `out`: "losses", the rows of `Recorder`, one a step; the validation loss "before" and "after"."""
    model, processor = load_model(init, device="cpu")  # the Trainer places it
    sizes = {"samples": len(examples), "epochs": 1, "batch_size": trial.batch_size, "times": trial.times, "order": "shuffled"}
    recipe = profile.stages["instruct"]
    sizes |= {"learning_rate": trial.rate * recipe.learning_rate, "cached_vision": looks is not None}
    recipe = replace(recipe, **sizes)
    model.config.loss_normalization = recipe.normalization
    before = validation_loss(model, processor, recipe, held_out)
    record = Recorder()
    handle = model.register_forward_hook(record, with_kwargs=True)
    options = RunOptions(seed=trial.seed, checkpoints=False, quiet=True)
    trained = train_stage(model, processor, recipe, examples, out, options, looks=looks)
    handle.remove()
    return {"losses": record.rows, "before": before, "after": validation_loss(trained, processor, recipe, held_out)}


@torch.no_grad()
def validation_loss(
    model: MedVForMaskedDiffusion, processor: MedVProcessor, recipe: StageRecipe, examples: Sequence[Example]
) -> float:
    """The mean loss of batches of BATCH, each example at four fixed times with fixed masks, in nats."""
    training = model.training
    stream = ValidationStream(examples, Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length))
    collate, losses = Collator(processor.special, padding=recipe.padding), []
    model.eval()
    for start in range(0, len(stream), BATCH):
        batch = collate([stream[place] for place in range(start, min(start + BATCH, len(stream)))])
        losses.append(float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss))
    model.train(training)
    return float(np.mean(losses))


# --- The band ---


def windows(losses: pd.DataFrame) -> pd.DataFrame:
    """Means over windows of equal length, about POINTS a training: the columns of `train_all` and `window`, its length.

    `step` is the last of a window, as in the log of a Trainer; what is left of a last window is dropped.
    """
    length = max(1, losses["step"].max() // POINTS)
    number = (losses["step"] - 1) // length
    kept = losses[(number + 1) * length <= losses["step"].max()]
    found = kept.assign(step=(number[kept.index] + 1) * length)
    keys = ["times", "seed", "normalization", "step"]
    return found.groupby(keys, sort=False, as_index=False)["loss"].mean().assign(window=length)


def in_scale(shares: np.ndarray, losses: np.ndarray, scale: str) -> np.ndarray:
    """Losses [..., n] at shares [n] of a run in a scale: as they are, or divided by their mean up to START."""
    return losses if scale == NATS else losses / losses[..., shares <= START + 1e-9].mean(axis=-1, keepdims=True)


def bounds(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median and the ends of the band of curves [seeds, points], over seeds."""
    low, middle, high = np.quantile(curves, [LOW, 0.5, HIGH], axis=0)
    return middle, low, high


def left_out(curves: np.ndarray) -> np.ndarray:
    """For each of the curves [seeds, points] the share of its points outside the band of the others: a healthy run's."""
    shares = []
    for place, curve in enumerate(curves):
        _, low, high = bounds(np.delete(curves, place, axis=0))
        shares.append(np.mean((curve < low) | (curve > high)))
    return np.array(shares)


def curves_of(smooth: pd.DataFrame) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(times, normalization) -> the last steps of the windows [points] and the curves [seeds, points], in nats."""
    found = {}
    for key, part in smooth.groupby(["times", "normalization"], sort=False):
        grid = part.pivot(index="seed", columns="step", values="loss")
        found[key] = grid.columns.to_numpy(), grid.to_numpy()
    return found


def band_of(losses: pd.DataFrame, trained: str, vocabulary: int) -> pd.DataFrame:
    """The band: a row per times, normalization, scale and window. What is drawn, and what `medv compare-loss` reads.

    median, low, high: over seeds; end, end_low, end_high: the same of the mean over the last fifth of the run. noise: of one
    step, relative. left_out, left_out_most: mean and largest of `left_out`. trained: the normalization that was trained,
    at `rate` of the recipe's learning rate. uniform: ln V, the loss of a uniform guess. steps, window, batch_size, seeds.
    """
    smooth, steps, frames = windows(losses), int(losses["step"].max()), []
    noise = noise_of(losses).groupby(["times", "normalization"])["noise"].mean()
    for (times, normalization), (ends, curves) in curves_of(smooth).items():
        for scale in (NATS, SHAPE):
            scaled = in_scale(ends / steps, curves, scale)
            median, low, high = bounds(scaled)
            healthy = left_out(scaled) if len(scaled) > 1 else np.array([np.nan])
            frame = pd.DataFrame({"step": ends, "median": median, "low": low, "high": high})
            last = bounds(scaled[:, ends / steps > 1 - START + 1e-9].mean(axis=1, keepdims=True))
            facts = dict(zip(("end", "end_low", "end_high"), (float(value[0]) for value in last), strict=True))
            facts |= {"noise": noise[times, normalization], "left_out": healthy.mean(), "left_out_most": healthy.max()}
            facts |= {"trained": trained, "rate": RATE, "uniform": math.log(vocabulary), "steps": steps, "batch_size": BATCH}
            where = {"times": times, "normalization": normalization, "scale": scale}
            facts |= {"seeds": len(curves), "window": int(smooth["window"].iloc[0])}
            frames.append(frame.assign(**facts)[["step", "median", "low", "high", *facts]].assign(**where))
    table = pd.concat(frames, ignore_index=True)
    return table[["times", "normalization", "scale", *table.columns.drop(["times", "normalization", "scale"])]]


# --- Its width ---


def relative_noise(losses: np.ndarray) -> float:
    """The standard deviation of one step's loss around its trend, over the mean loss: from differences of successive steps."""
    return float(np.sqrt(np.mean(np.diff(losses) ** 2) / 2) / losses.mean())


def noise_of(losses: pd.DataFrame) -> pd.DataFrame:
    """`relative_noise` of each training: times, normalization, seed, noise."""
    groups = losses.sort_values("step").groupby(["times", "normalization", "seed"], sort=False)["loss"]
    return groups.apply(lambda part: relative_noise(part.to_numpy())).rename("noise").reset_index()


def noise_ratio(losses: pd.DataFrame, normalization: str) -> Estimate:
    """The noise of a step with stratified t over that with iid t, paired by seed: geometric mean with its 95 % interval."""
    found = noise_of(losses)
    grid = found[found["normalization"] == normalization].pivot(index="seed", columns="times", values="noise")
    gap = bootstrap(np.log(grid["stratified"] / grid["iid"]))
    return Estimate(*np.exp([gap.value, gap.low, gap.high]), gap.n)


def ratio_verdict(ratio: Estimate) -> str:
    """ "less noise", "more noise" or "no difference shown"."""
    return Estimate(*np.log([ratio.value, ratio.low, ratio.high])).verdict("more noise", "less noise")


def fall_of(losses: pd.DataFrame, times: str, normalization: str) -> Estimate:
    """The mean loss over the last fifth of the steps minus that over the first, in percent of the first, over seeds."""
    part = losses[(losses["times"] == times) & (losses["normalization"] == normalization)]
    steps = losses["step"].max()
    first, last = (
        part[place].groupby("seed")["loss"].mean()
        for place in (part["step"] <= START * steps, part["step"] > (1 - START) * steps)
    )
    return bootstrap(100 * (last / first - 1))


def band_table(losses: pd.DataFrame) -> pd.DataFrame:
    """A row per normalization and times: last window, noise of a step, width of the band, what a left-out seed does."""
    found, rows = noise_of(losses), []
    curves, steps = curves_of(windows(losses)), losses["step"].max()
    for normalization in NORMALIZATIONS:
        for times in TIMES:
            ends, grid = curves[times, normalization]
            median, low, high = bounds(grid)
            mine = found[(found["times"] == times) & (found["normalization"] == normalization)]["noise"]
            outside = left_out(in_scale(ends / steps, grid, SHAPE)) if len(grid) > 1 else None
            ratio = noise_ratio(losses, normalization)
            rows.append(
                {
                    "normalization": normalization,
                    "t": times,
                    "last window (nats)": f"{median[-1]:.2f} [{low[-1]:.2f}, {high[-1]:.2f}]",
                    "last against first fifth (%)": fall_of(losses, times, normalization).cell("+.1f"),
                    "noise of one step (%)": bootstrap(100 * mine).cell(),
                    "width of the band (%)": bootstrap(100 * (high - low) / median).cell(),
                    "noise, stratified / iid": ratio.cell(".2f") if times == "stratified" else "",
                    "stratified t": ratio_verdict(ratio) if times == "stratified" else "",
                    "left-out seed outside (%)": NOT_MEASURED
                    if outside is None
                    else f"{100 * outside.mean():.0f} (at most {100 * outside.max():.0f})",
                    "n": len(grid),
                }
            )
    return pd.DataFrame(rows)


def conclusion(losses: pd.DataFrame, validation: pd.DataFrame, trained: str) -> str:
    """Sentences computed from the losses: what stratified t does to the noise of a step, and which curves show the learning."""
    lines = []
    for normalization in NORMALIZATIONS:
        ratio = noise_ratio(losses, normalization)
        lines.append(f"{normalization}: stratified over iid t {ratio.cell('.2f')}, {ratio.n} seeds: {ratio_verdict(ratio)}")
    for times in TIMES:
        own = fall_of(losses, times, trained)
        mine = validation[validation["times"] == times]
        fixed = bootstrap(100 * (mine["after"] / mine["before"] - 1))
        words = ("rises", "falls", "no change shown")
        lines.append(
            f"{times} t, {trained}: the training loss from the first to the last fifth, percent: {own.cell('+.1f')}: "
            f"{own.verdict(*words)}; the validation loss at fixed noise: {fixed.cell('+.1f')}: {fixed.verdict(*words)}"
        )
    return "\n".join(lines)
