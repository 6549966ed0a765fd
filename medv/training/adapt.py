"""From a causal Llama to a masked-diffusion one, on text alone: `medv train adapt`.

What the field does in this place differs in three things, and each is a choice here. Attention sees both directions at once,
or future tokens are opened to it at random, more of them with every step (DiffuLLaMA). The hidden states of every layer are
drawn to those of the frozen causal model that reads the clean text, or are not (Repr-Align). Masked tokens weigh 1/t, or all
the same. Always: no shift (the logits at i predict token i), embeddings and head stay as they are, stratified t.

Order, noise and attention are functions of (seed, step), so a run that was killed goes on bit for bit from its checkpoint.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from medv.artifacts import SPEED, atomic_file, fingerprint, write_json
from medv.checkpoints.loading import load_network, load_tokenizer, loading_errors
from medv.checkpoints.shards import read_object
from medv.data.chat import SpecialTokens
from medv.diffusion.corruption import corrupt, draw_noise
from medv.diffusion.loss import CHUNK, masked_cross_entropy
from medv.ownership import claim_folder
from medv.training.adapt_batches import AdaptRecipe, Batch, Batches
from medv.training.launch import TrainingStopped
from medv.training.meter import peak_bytes

GRID = 4
"""Held-out rows are hidden at so many t, the midpoints of equal parts of (0, 1)."""
EVALUATIONS, CHECKPOINTS = 8, 5


class Adapter:
    """The tower that learns, its teacher, and its optimizer. On CUDA both run in bfloat16, and what is learned is kept in
    float32; elsewhere everything is float32.
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
        for tower in (self.student, self.teacher) if compiled and self.teacher else (self.student,) * compiled:
            compile_parts(tower)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and alignment of a part, summed with the weights of its batch: two scalars, float32."""
        seen = {"use_cache": False, "output_hidden_states": self.teacher is not None}
        output = self.student.model(batch.noisy, attention_mask=batch.attention, **seen)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.places)  # [M, D]
        chunk = max(CHUNK, 2**29 // self.student.config.vocab_size) if self.device.type == "cuda" else CHUNK
        loss = masked_cross_entropy(hidden, self.student.lm_head, batch.labels, batch.weights, chunk=chunk)
        if self.teacher is None:
            return loss, torch.zeros_like(loss)
        with torch.no_grad():
            told = self.teacher.model(batch.clean, **seen).hidden_states[1:]
        return loss, distance(output.hidden_states[1:], told, batch.places) / batch.masked

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
        self._hand_down()
        return total

    @torch.no_grad()
    def _hand_down(self) -> None:
        """The learned weights to the network that runs."""
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)

    @torch.no_grad()
    def save(self, file: Path, state: dict) -> None:
        """Weights, moments of the optimizer and `state` in one file, which is whole or absent."""
        kept = {f"weight.{i}": weight.detach() for i, weight in enumerate(self.masters)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            kept |= {f"{name}.{i}": value for name, value in moments.items()}
        with atomic_file(file) as partial:
            save_file({name: value.cpu().contiguous() for name, value in kept.items()}, partial, {"state": json.dumps(state)})

    @torch.no_grad()
    def load(self, file: Path) -> dict:
        """Take up what `save` wrote; returns its state."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (the file object is no mapping)
                name, _, i = key.rpartition(".")
                if name == "weight":
                    self.masters[int(i)].copy_(stored.get_tensor(key))
                else:
                    moments.setdefault(int(i), {})[name] = stored.get_tensor(key)
            state = json.loads(stored.metadata()["state"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._hand_down()
        return state


def compile_parts(tower: LlamaForCausalLM, **options) -> None:
    """Compile the parts of the layers, once for all layers; a whole layer would break at the hook that keeps its states."""
    for layer in tower.model.layers:
        for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=False, **options)


def half_on(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA; a CPU may be a hundred times slower in it, and computes in float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_tower(folder: Path, *, dtype: torch.dtype, causal: bool) -> LlamaForCausalLM:
    """A language tower in evaluation mode, with its attention set to causal or bidirectional; nothing is downloaded."""
    return load_network(LlamaForCausalLM, folder, dtype=dtype, is_causal=causal)


def distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the sum over `places` [M] of 1 - cosine; a layer's states are [B, T, D]. A float32 scalar."""
    apart = []
    for own, told in zip(student, teacher, strict=True):
        pair = (states.flatten(0, 1).index_select(0, places).float() for states in (own, told))
        apart.append((1 - F.cosine_similarity(*pair, dim=-1)).sum())
    return torch.stack(apart).mean()


@torch.inference_mode()
def held_out_losses(tower: LlamaForCausalLM, rows: torch.Tensor, mask: int, *, at_once: int = 16) -> torch.Tensor:
    """Mean cross-entropy of the masked tokens of each row at each t of the grid, float32 [n, GRID] on the CPU.

    The masks depend on the place of a row alone, so that two towers are asked the same.
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

    `held_out` rows are only looked at. The folder becomes a language tower (weights and tokenizer) with `history.json`,
    `speed.json` and, written last, `training.json`; a finished one is left as it is, one with a checkpoint of the same run
    goes on. `stop_after` ends early with a checkpoint and no result. Raises ValueError for a tower that is not causal or rows
    that do not fit it, TrainingStopped where the loss is not finite.
    """
    finished = out / "training.json"
    tokenizer = load_tokenizer(language)
    mask = check_tower(language, tokenizer, recipe)
    data = [hashlib.sha256(rows.numpy().tobytes()).hexdigest() for rows in (train, held_out)]
    run = {"recipe": asdict(recipe), "seed": seed, "text": fingerprint(data), "start": fingerprint(language)}
    with claim_folder(out, {"made_by": "medv train adapt"} | run, inputs=[language]):
        if finished.exists():
            return json.loads(finished.read_text(encoding="utf-8"))
        adapter = Adapter(language, recipe, torch.device(device), compiled=compiled)
        batches = Batches(train, recipe, mask, seed=seed, accumulation=accumulation)
        work = _Run(adapter, batches, held_out, out / "checkpoint.safetensors", checkpoints=checkpoints, quiet=quiet)
        if work.train(stop_after) < recipe.steps:
            return {}
        _save(adapter, tokenizer, language, out)
        rows = {"train": len(train), "held_out": len(held_out)}
        facts = {"recipe": asdict(recipe), "seed": seed, "steps": recipe.steps, "rows": rows}
        evaluations = [row["eval_loss"] for row in work.history if "eval_loss" in row]
        facts |= {"eval_loss_before": evaluations[0], "eval_loss": evaluations[-1]}
        write_json(out / "history.json", work.history)
        write_json(out / SPEED, work.speed())
        write_json(finished, facts)
        work.file.unlink(missing_ok=True)
    return facts


def check_tower(language: Path, tokenizer, recipe: AdaptRecipe) -> int:
    """The id of the mask token; a ValueError where the tower cannot be adapted by this recipe."""
    kind, mask = read_object(language / "config.json").get("model_type"), SpecialTokens.of(tokenizer).mask
    if kind != "llama":
        raise ValueError(f"{language} is a {kind} model: a causal Llama is needed")
    with loading_errors(language):
        config = LlamaConfig.from_pretrained(language, local_files_only=True)
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{language} sees both directions already: give the causal tower that it came from")
    if mask >= config.vocab_size:
        raise ValueError(f"{language} has {config.vocab_size} embeddings and none for the mask, token {mask}: add a row")
    if recipe.length > config.max_position_embeddings:
        raise ValueError(
            f"rows of {recipe.length} tokens are longer than the {config.max_position_embeddings} positions of {language}"
        )
    return mask


def _save(adapter: Adapter, tokenizer, language: Path, out: Path) -> None:
    """The adapted tower in float32, its tokenizer, and what the folder of the start says of licence and origin."""
    student = adapter.student.float()
    for weight, master in zip(adapter.weights, adapter.masters, strict=True):
        weight.data = master.detach().to(torch.float32)
    student.config.dtype = torch.float32
    student.config._name_or_path = ""  # a model must not carry the paths of the machine it was made on
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in (*language.glob("LICENSE*"), *language.glob("origin*")):
        shutil.copy(file, out)


class _Run:
    """The loop: steps, held-out losses along the way, checkpoints."""

    def __init__(
        self, adapter: Adapter, batches: Batches, held_out: torch.Tensor, file: Path, *, checkpoints: bool, quiet: bool
    ):
        self.adapter, self.batches, self.held_out, self.file = adapter, batches, held_out, file
        self.checkpoints, self.quiet = checkpoints, quiet
        self.history: list[dict] = []
        self.measured: list[dict] = []

    def train(self, stop_after: int | None) -> int:
        """Go on from the checkpoint, if there is one, to the end or to `stop_after`; returns the steps that are done."""
        recipe, done = self.adapter.recipe, 0
        if self.file.exists():
            state = self.adapter.load(self.file)
            done, self.history = state["step"], state["history"]
        else:
            self._evaluate(0)
        last = min(recipe.steps, stop_after or recipe.steps)
        saving = max(1, recipe.steps // CHECKPOINTS)
        telling = {*range(0, recipe.steps, max(1, recipe.steps // 40)), *range(0, recipe.steps, saving), last}
        looking = {*range(0, recipe.steps, max(1, recipe.steps // EVALUATIONS)), recipe.steps}
        with tqdm(total=recipe.steps, initial=done, desc="adapting", disable=self.quiet) as bar:
            sums, since, started = torch.zeros(3, device=self.adapter.device), done, time.perf_counter()
            while done < last:
                sums += self.adapter.step(self.batches(done), recipe.rate(done))
                done += 1
                if done not in telling:
                    continue
                self._tell(done, sums / (done - since), time.perf_counter() - started, done - since)
                bar.set_postfix(loss=self.history[-1]["loss"], tokens_per_second=round(self.measured[-1]["tokens_per_second"]))
                bar.update(done - since)
                if done in looking:
                    self._evaluate(done)
                if self.checkpoints and done < recipe.steps and (done % saving == 0 or done == last):
                    self.adapter.save(self.file, {"step": done, "history": self.history})
                sums, since, started = torch.zeros_like(sums), done, time.perf_counter()
        return done

    def _tell(self, step: int, means: torch.Tensor, seconds: float, steps: int) -> None:
        loss, apart, norm = means.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(f"the loss is {loss} and its gradient {norm} at step {step}: lower the learning rate")
        recipe = self.adapter.recipe
        row = {"step": step, "tokens": step * recipe.batch_size * recipe.length, "loss": loss}
        row |= {"alignment": apart} if recipe.align else {}
        self.history.append(row | {"gradient_norm": norm, "learning_rate": recipe.rate(step - 1)})
        rate = steps * recipe.batch_size * recipe.length / seconds
        self.measured.append({"step": step, "seconds": seconds, "tokens_per_second": rate})

    def _evaluate(self, step: int) -> None:
        by_t = held_out_losses(self.adapter.student, self.held_out, self.batches.mask).mean(dim=0)
        recipe = self.adapter.recipe
        row = {"step": step, "tokens": step * recipe.batch_size * recipe.length, "eval_loss": float(by_t.mean())}
        self.history.append(row | {"eval_by_t": [round(value, 4) for value in by_t.tolist()]})

    def speed(self) -> dict:
        """Tokens a second since the last start, held-out rows and checkpoints not counted, and the memory taken."""
        seconds = sum(row["seconds"] for row in self.measured)
        tokens = sum(row["seconds"] * row["tokens_per_second"] for row in self.measured)
        name = torch.cuda.get_device_name() if self.adapter.device.type == "cuda" else "CPU"
        total = {"tokens_per_second": tokens / seconds if seconds else None, "seconds": seconds, "device": name}
        return {"total": total | {"peak_bytes": peak_bytes()}, "rows": self.measured}
