"""Continue a causal Llama as a masked-diffusion model, on text alone: `medv train adapt`.

Published recipes differ in three choices, all options here: bidirectional attention at once or opened at random (DiffuLLaMA);
hidden states aligned with the frozen causal model (Repr-Align) or not; loss weights 1/t or uniform. There is no shift (the
logits at i predict token i), embeddings and head stay frozen, t is stratified. Order, noise and attention are functions of
(seed, step), so a killed run resumes bit for bit.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from medv import limits
from medv.artifacts import SPEED, atomic_file, fingerprint, write_json
from medv.checkpoints.card import finish_folder, origin_of
from medv.checkpoints.loading import load_network, load_tokenizer, loading_errors
from medv.checkpoints.shards import read_object
from medv.data.chat import SpecialTokens
from medv.diffusion.corruption import corrupt, draw_noise, noise_generator
from medv.diffusion.loss import CHUNK, masked_cross_entropy, token_weights
from medv.ownership import claim_folder
from medv.training.costs import peak_bytes
from medv.training.launch import TrainingStopped
from medv.training.stream import TrainingStream

ATTENTION = ("at_once", "annealed")
WEIGHTS = {"uniform": "masked", "1/t": "sample"}
"""The weights of masked tokens, as normalizations of `medv.diffusion.loss`."""
GRID = 4
"""Held-out rows are masked at so many t, the midpoints of equal parts of (0, 1)."""
EVALUATIONS, CHECKPOINTS = 8, 5
MADE_BY = "medv train adapt"


@dataclass(frozen=True)
class AdaptRecipe:
    """How a tower is adapted. tokens: seen in all, a row again with fresh masks in every epoch; length: of a row.

    anneal: the share of the steps in which annealed attention opens. alignment: the weight of the mean over layers of
    1 - cosine, where `align` is set. learning_rate: AdamW, cosine decay after `warmup`, a share of the steps.
    """

    attention: str = "at_once"
    align: bool = True
    weights: str = "uniform"
    tokens: int = 2_000_000
    length: int = 256
    batch_size: int = 16
    learning_rate: float = 3e-4
    warmup: float = 0.05
    anneal: float = 0.3
    alignment: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self):
        for name, known in (("attention", ATTENTION), ("weights", tuple(WEIGHTS))):
            limits.named(name, getattr(self, name), known)
        for name in ("tokens", "length", "batch_size"):
            limits.whole(name, getattr(self, name), 1)
        limits.real("learning_rate", self.learning_rate, 0, open_ends="least")
        for name, most in {"warmup": 1, "anneal": 1, "alignment": math.inf, "weight_decay": math.inf}.items():
            limits.real(name, getattr(self, name), 0, most)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.tokens / (self.batch_size * self.length))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        fallen = max(0, step - rising) / max(1, self.steps - rising)
        return self.learning_rate * min((step + 1) / rising, 0.5 + 0.5 * math.cos(math.pi * fallen))


def opened_attention(length: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """bool [1, 1, T, T], True where a query (third dimension) sees a key: the past, itself, and a future key by chance.

    Each pair of a query and a later key is drawn independently: 0 is causal attention, 1 is bidirectional.
    """
    drawn = torch.rand(length, length, generator=generator) < share
    return (drawn | torch.ones(length, length, dtype=torch.bool).tril())[None, None]


@dataclass(frozen=True)
class Batch:
    """Rows of a step: `clean` and `noisy` ids [B, T]; of the M masked positions `places` in the flattened rows, `labels`
    and `weights`, all [M]; how many positions are masked in the whole global batch; `attention` [1, 1, T, T] bool, or None
    where everything is seen.
    """

    clean: torch.Tensor
    noisy: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    masked: int
    attention: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on that device; a GPU is not synchronized."""
        moved = {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        if device.type == "cuda":
            moved = {name: part.pin_memory() for name, part in moved.items()}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in moved.items()})


class Batches:
    """The global batch of each step, cut into `accumulation` parts."""

    def __init__(self, rows: torch.Tensor, recipe: AdaptRecipe, mask: int, *, seed: int, accumulation: int = 1):
        if recipe.batch_size % accumulation:
            raise ValueError(f"a batch of {recipe.batch_size} cannot be cut into {accumulation}: choose a divisor")
        order = {"seed": seed, "batch_size": recipe.batch_size, "steps": recipe.steps, "times": "stratified"}
        self.rows, self.recipe, self.mask, self.seed, self.parts = rows, recipe, mask, seed, accumulation
        self.stream = TrainingStream(range(len(rows)), lambda index: {"row": index}, **order)

    def __call__(self, step: int) -> list[Batch]:
        """The parts of a step; their losses add up to that of the batch."""
        size, parts = self.recipe.batch_size, self.parts
        items = [self.stream[position] for position in range(step * size, (step + 1) * size)]
        indices, strata = [item["row"] for item in items], [item["stratum"] for item in items]
        t, u = draw_noise(self.seed, step, indices, self.recipe.length, strata=strata)
        rows = self.rows[indices]  # [B, T]
        targets = torch.ones_like(rows, dtype=torch.bool)
        noise = corrupt(rows, targets, t, u, self.mask)
        shares = token_weights(noise.masked, targets, noise.p_mask, WEIGHTS[self.recipe.weights])  # [M]
        counts, attention = noise.masked.view(parts, -1).sum(dim=1).tolist(), self.attention(step)
        cut = zip(rows.chunk(parts), noise.ids.chunk(parts), noise.masked.chunk(parts), shares.split(counts), strict=True)
        return [
            Batch(clean, noisy, masked.flatten().nonzero()[:, 0], clean[masked], share, len(shares), attention)
            for clean, noisy, masked, share in cut
        ]

    def attention(self, step: int) -> torch.Tensor | None:
        """The attention mask of a step, see `opened_attention`; None for bidirectional."""
        opening = math.ceil(self.recipe.anneal * self.recipe.steps)
        if self.recipe.attention == "at_once" or step + 1 >= opening:
            return None
        return opened_attention(self.recipe.length, (step + 1) / opening, noise_generator(self.seed, step, -1))


class Adapter:
    """The student tower, its teacher, and its optimizer. On CUDA both towers run in bfloat16, and what learns is kept in
    float32 (`masters`); elsewhere everything is float32.
    """

    def __init__(self, language: Path, recipe: AdaptRecipe, device: torch.device, *, compiled: bool = False):
        self.recipe, self.device = recipe, device
        dtype = half_on(device)
        self.student = load_tower(language, dtype=dtype, causal=False).to(device)
        self.teacher = load_tower(language, dtype=dtype, causal=True).to(device) if recipe.align else None
        self.student.requires_grad_(False)
        self.weights = [*self.student.model.layers.parameters(), *self.student.model.norm.parameters()]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.masters = self.weights
        if dtype != torch.float32:
            first = load_tower(language, dtype=torch.float32, causal=False).model
            self.masters = [w.detach().to(device) for w in (*first.layers.parameters(), *first.norm.parameters())]
        self.optimizer = torch.optim.AdamW(self.masters, weight_decay=recipe.weight_decay, fused=True)
        for tower in filter(None, (self.student, self.teacher) if compiled else ()):
            for layer in tower.model.layers:  # a whole layer would break at the hook that keeps its states
                for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
                    part.compile(dynamic=False)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and alignment of a part, summed with the weights of its batch: two scalars, float32."""
        how = {"use_cache": False, "output_hidden_states": self.teacher is not None}
        output = self.student.model(batch.noisy, attention_mask=batch.attention, **how)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.places)  # [M, D]
        chunk = max(CHUNK, 2**29 // self.student.config.vocab_size) if self.device.type == "cuda" else CHUNK
        loss = masked_cross_entropy(hidden, self.student.lm_head, batch.labels, batch.weights, chunk=chunk)
        if self.teacher is None:
            return loss, torch.zeros_like(loss)
        with torch.no_grad():
            targets = self.teacher.model(batch.clean, **how).hidden_states[1:]
        return loss, distance(output.hidden_states[1:], targets, batch.places) / max(batch.masked, 1)

    def step(self, parts: Sequence[Batch], rate: float) -> torch.Tensor:
        """One step of the optimizer; float32 [3] on the device: cross-entropy, alignment, norm of the gradient."""
        total = torch.zeros(3, device=self.device)
        for batch in parts:
            loss, apart = self.losses(batch.to(self.device))
            (loss + self.recipe.alignment * apart).backward()
            total[:2] += torch.stack([loss, apart]).detach()
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        total[2] = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return total

    def save(self, file: Path, state: dict) -> None:
        """Weights, optimizer and `state` in one file, which is whole or absent."""
        with atomic_file(file) as partial:
            torch.save({"weights": self.masters, "optimizer": self.optimizer.state_dict(), "state": state}, partial)

    @torch.no_grad()
    def load(self, file: Path) -> dict:
        """Load what `save` wrote; returns its state."""
        stored = torch.load(file, map_location="cpu", weights_only=True)
        for master, weight, kept in zip(self.masters, self.weights, stored["weights"], strict=True):
            master.copy_(kept)
            weight.copy_(kept)
        self.optimizer.load_state_dict(stored["optimizer"])
        return stored["state"]


def half_on(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA; a CPU may be a hundred times slower in it, and computes in float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_tower(folder: Path, *, dtype: torch.dtype, causal: bool) -> LlamaForCausalLM:
    """A language tower in evaluation mode, with its attention set to causal or bidirectional; nothing is downloaded."""
    return load_network(LlamaForCausalLM, folder, dtype=dtype, is_causal=causal)


def distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the sum over `places` [M] of 1 - cosine; a layer's states are [B, T, D]. A float32 scalar."""
    apart = []
    for layers in zip(student, teacher, strict=True):
        pair = (states.flatten(0, 1).index_select(0, places).float() for states in layers)
        apart.append((1 - F.cosine_similarity(*pair, dim=-1)).sum())
    return torch.stack(apart).mean()


@torch.inference_mode()
def held_out_losses(tower: LlamaForCausalLM, rows: torch.Tensor, mask: int, *, at_once: int = 16) -> torch.Tensor:
    """Mean cross-entropy of the masked tokens of each row at each t of the grid, float32 [n, GRID] on the CPU.

    The masks depend on the index of a row alone, so that the losses of two towers are comparable.
    """
    losses = torch.zeros(len(rows), GRID)
    for k in range(GRID):
        t = torch.full((len(rows),), (k + 0.5) / GRID)
        _, u = draw_noise(0, -1 - k, range(len(rows)), rows.shape[1])
        for start in range(0, len(rows), at_once):
            here = slice(start, start + at_once)
            clean = rows[here]
            noise = corrupt(clean, torch.ones_like(clean, dtype=torch.bool), t[here], u[here], mask)
            states = tower.model(noise.ids.to(tower.device), use_cache=False).last_hidden_state  # [B, T, D]
            for row, masked in enumerate(noise.masked):
                places = masked.nonzero()[:, 0].to(tower.device)
                weights = torch.full((len(places),), 1 / max(len(places), 1), device=tower.device)
                labels = clean[row][masked].to(tower.device)
                losses[start + row, k] = masked_cross_entropy(states[row, places], tower.lm_head, labels, weights)
    return losses


def adapt(
    language: Path,
    train: torch.Tensor,
    held_out: torch.Tensor,
    recipe: AdaptRecipe,
    out: Path,
    *,
    seed: int = 0,
    accumulation: int = 1,
    device: str | torch.device = "cpu",
    compiled: bool = False,
    stop_after: int | None = None,
    checkpoints: bool = True,
    quiet: bool = False,
) -> dict:
    """Adapt the causal tower in `language` on rows [n, length] and save it to the folder `out`; returns its facts.

    `held_out` rows are only evaluated. The folder becomes a language tower (weights and tokenizer) with `history.json`,
    `speed.json` and, written last, `training.json`; a finished one is left as it is, one with a checkpoint of the same run
    is continued. `stop_after` ends early with a checkpoint and no result. Raises ValueError for a tower that is not causal or
    rows that do not fit it, TrainingStopped where the loss is not finite.
    """
    finished, checkpoint = out / "training.json", out / "checkpoint.pt"
    tokenizer = load_tokenizer(language)
    kind, mask = read_object(language / "config.json").get("model_type"), SpecialTokens.of(tokenizer).mask
    if kind != "llama":
        raise ValueError(f"{language} is a {kind} model: a causal Llama is needed")
    with loading_errors(language):
        config = LlamaConfig.from_pretrained(language, local_files_only=True)
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{language} sees both directions already: give the causal tower that it came from")
    if mask >= config.vocab_size:
        raise ValueError(f"{language} has {config.vocab_size} embeddings and none for the mask, token {mask}: add a row")
    if recipe.length > (positions := config.max_position_embeddings):
        raise ValueError(f"rows of {recipe.length} tokens are longer than the {positions} positions of {language}")
    batches = Batches(train, recipe, mask, seed=seed, accumulation=accumulation)
    data = [hashlib.sha256(rows.numpy().tobytes()).hexdigest() for rows in (train, held_out)]
    run = {"recipe": asdict(recipe), "seed": seed, "text": fingerprint(data), "start": fingerprint(language)}
    with claim_folder(out, {"made_by": MADE_BY} | run, inputs=[language]):
        if finished.exists():
            return json.loads(finished.read_text(encoding="utf-8"))
        adapter = Adapter(language, recipe, torch.device(device), compiled=compiled)
        done, history = 0, []
        if checkpoint.exists():
            state = adapter.load(checkpoint)
            done, history = state["step"], state["history"]
        last = min(recipe.steps, stop_after or recipe.steps)
        speed = _train(adapter, batches, held_out, history, (done, last), checkpoint if checkpoints else None, quiet=quiet)
        if last < recipe.steps:
            return {}
        student = adapter.student.float()
        for weight, master in zip(adapter.weights, adapter.masters, strict=True):
            weight.data = master.detach().to(torch.float32)
        student.config.dtype = torch.float32
        student.config._name_or_path = ""  # a model must not carry the paths of the machine it was made on
        student.save_pretrained(out)
        tokenizer.save_pretrained(out)
        for file in filter(Path.is_file, (*language.glob("LICENSE*"), *language.glob("origin*"))):  # LICENSES is a folder
            shutil.copy(file, out)
        before, *_, after = [row["eval_loss"] for row in history if "eval_loss" in row]
        facts = {"recipe": asdict(recipe), "seed": seed, "steps": recipe.steps, "start": origin_of([language])["start"]}
        facts |= {"rows": {"train": len(train), "held_out": len(held_out)}, "eval_loss_before": before, "eval_loss": after}
        write_json(out / "history.json", history)
        write_json(out / SPEED, speed)
        finish_folder(out, training=facts)
        write_json(finished, facts)
        checkpoint.unlink(missing_ok=True)
    return facts


def _train(
    adapter: Adapter,
    batches: Batches,
    held_out: torch.Tensor,
    history: list[dict],
    steps: tuple[int, int],
    checkpoint: Path | None,
    *,
    quiet: bool,
) -> dict:
    """Take the steps from, to, with held-out losses and checkpoints on the way; appends to `history`.

    Returns tokens a second, held-out rows and checkpoints not counted, and the memory taken.
    """
    recipe, (done, last) = adapter.recipe, steps
    measured: list[dict] = []

    def row_of(step: int) -> dict:
        return {"step": step, "tokens": step * recipe.batch_size * recipe.length}

    def evaluate(step: int) -> None:
        by_t = held_out_losses(adapter.student, held_out, batches.mask).mean(dim=0)
        values = {"eval_loss": float(by_t.mean()), "eval_by_t": [round(value, 4) for value in by_t.tolist()]}
        history.append(row_of(step) | values)

    if not done:
        evaluate(0)
    saving = max(1, recipe.steps // CHECKPOINTS)
    evaluated = {*range(0, recipe.steps, max(1, recipe.steps // EVALUATIONS)), recipe.steps}
    logged = {*range(0, recipe.steps, max(1, recipe.steps // 40)), *range(0, recipe.steps, saving), *evaluated, last}
    with tqdm(total=recipe.steps, initial=done, desc="adapting", disable=quiet) as bar:
        sums, since, started = torch.zeros(3, device=adapter.device), done, time.perf_counter()
        while done < last:
            sums += adapter.step(batches(done), recipe.rate(done))
            done += 1
            if done not in logged:
                continue
            count = done - since
            loss, apart, norm = (sums / count).tolist()
            seconds = time.perf_counter() - started
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingStopped(f"the loss is {loss} and its gradient {norm} at step {done}: lower the learning rate")
            row = row_of(done) | {"loss": loss} | ({"alignment": apart} if recipe.align else {})
            history.append(row | {"gradient_norm": norm, "learning_rate": recipe.rate(done - 1)})
            rate = count * recipe.batch_size * recipe.length / seconds
            measured.append({"step": done, "seconds": seconds, "tokens_per_second": rate})
            bar.set_postfix(loss=loss, tokens_per_second=round(rate))
            bar.update(count)
            if done in evaluated:
                evaluate(done)
            if checkpoint and done < recipe.steps and (done % saving == 0 or done == last):
                adapter.save(checkpoint, {"step": done, "history": history})
            sums, since, started = torch.zeros_like(sums), done, time.perf_counter()
    seconds = sum(row["seconds"] for row in measured)
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in measured)
    name = torch.cuda.get_device_name() if adapter.device.type == "cuda" else "CPU"
    total = {"tokens_per_second": tokens / seconds if seconds else None, "seconds": seconds, "device": name}
    return {"total": total | {"peak_bytes": peak_bytes()}, "rows": measured}
