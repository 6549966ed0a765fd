"""What a step of `medv.training.adapt` sees: the recipe, the corrupted rows, and what may attend to what.

Everything is a function of (seed, step) and is computed before a GPU sees it.
"""

import math
from dataclasses import dataclass, replace

import torch

from medv.diffusion.corruption import corrupt, draw_noise, noise_generator
from medv.diffusion.loss import token_weights
from medv.training.stream import TrainingStream

ATTENTION = ("at_once", "annealed")
WEIGHTS = {"uniform": "masked", "1/t": "sample"}
"""The weights of masked tokens, as normalizations of `medv.diffusion.loss`."""


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
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(known)}")
        for name in ("tokens", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

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

    Each pair of a query and a later key is drawn by itself: 0 is causal attention, 1 sees everything.
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
        """The batch there; a GPU is not made to wait."""
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
        size = self.recipe.batch_size
        items = [self.stream[position] for position in range(step * size, (step + 1) * size)]
        indices, strata = [item["row"] for item in items], [item["stratum"] for item in items]
        t, u = draw_noise(self.seed, step, indices, self.recipe.length, strata=strata)
        return _cut(self.rows[indices], t, u, self.mask, self.recipe.weights, self.attention(step), self.parts)

    def attention(self, step: int) -> torch.Tensor | None:
        """What the positions of this step may see; None for everything."""
        opening = math.ceil(self.recipe.anneal * self.recipe.steps)
        if self.recipe.attention == "at_once" or step + 1 >= opening:
            return None
        return opened_attention(self.recipe.length, (step + 1) / opening, noise_generator(self.seed, step, -1))


def _cut(rows, t, u, mask: int, weights: str, attention: torch.Tensor | None, parts: int) -> list[Batch]:
    """Corrupt rows [B, T] and cut them. Done before a GPU sees them: it then need not say how many are masked."""
    targets = torch.ones_like(rows, dtype=torch.bool)
    noise = corrupt(rows, targets, t, u, mask)
    shares = token_weights(noise.masked, targets, noise.p_mask, WEIGHTS[weights])  # [M]
    counts = noise.masked.view(parts, -1).sum(dim=1).tolist()
    cut = zip(rows.chunk(parts), noise.ids.chunk(parts), noise.masked.chunk(parts), shares.split(counts), strict=True)
    return [
        Batch(clean, noisy, masked.flatten().nonzero()[:, 0], clean[masked], share, len(shares), attention)
        for clean, noisy, masked, share in cut
    ]
