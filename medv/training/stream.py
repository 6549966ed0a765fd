"""The order of training: which example, at which step, with which noise.

Position i of the stream holds an example of a permutation drawn from (seed, epoch), and the seeds of its noise, (seed, step,
example index). So order and noise are the same on one process and on eight, with and without accumulation, and after a resume,
as long as the global batch size is the same.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from medv import limits
from medv.data.example import Example
from medv.data.images import ImageError
from medv.profiles import StageRecipe

TIMES = ("iid", "stratified")
ORDERS = ("shuffled", "by_length")
POOL = 50  # batches of shuffled examples that are sorted by length together


def training_steps(recipe: StageRecipe, examples: int) -> int:
    """Optimizer steps of a recipe on so many examples."""
    return max(1, math.ceil(examples * recipe.epochs / recipe.batch_size))


class TrainingStream(Dataset):
    """`steps * batch_size` items in training order; item = encode(example) plus the seeds of its noise.

    times="iid": each t is uniform (the reference). "stratified": the samples of one global batch take the batch_size equal
    parts of (0, 1), so that every batch covers the interval evenly (MDLM). order="by_length": batches of similar length, in
    shuffled order; the length is that of the text, in characters. skip_corrupt=True replaces an example whose image cannot be
    read by the next one of the order, and adds its id to `skipped`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Callable[[Example], dict],
        *,
        seed: int,
        batch_size: int,
        steps: int,
        times: str = "iid",
        order: str = "shuffled",
        skip_corrupt: bool = False,
    ):
        if not examples:
            raise ValueError("there are no training examples")
        limits.named("times", times, TIMES)
        limits.named("order", order, ORDERS)
        self.examples, self.encode, self.order = examples, encode, order
        self.seed, self.batch_size, self.steps, self.times = seed, batch_size, steps, times
        self.skip_corrupt, self.skipped = skip_corrupt, set[str]()
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, 0x0DE2])
        order = rng.permutation(len(self.examples))
        if self.order == "shuffled":
            return order
        lengths = np.array([sum(len(turn.text) for turn in example.turns) for example in self.examples])
        begun = -epoch * len(order) % self.batch_size  # what the last batch of the epoch before still takes
        pool = POOL * self.batch_size
        batches = []
        for start in range(begun, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        *whole, last = batches or [order[:0]]  # a last batch that is not full stays at the end
        return np.concatenate([order[:begun], *(whole[i] for i in rng.permutation(len(whole))), last])

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, position: int) -> dict:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside the {len(self)} of the stream")
        step, slot = divmod(position, self.batch_size)
        stratum = (slot, self.batch_size) if self.times == "stratified" else (0, 1)
        noise = {"noise": (self.seed, step, self._index(position)), "stratum": stratum}
        count = len(self.examples)
        start = position - position % count
        for further in range(count):
            example = self.examples[self._index(start + (position - start + further) % count)]
            try:
                return self.encode(example) | noise
            except ImageError:
                if not self.skip_corrupt:
                    raise
                self.skipped.add(example.id)
        raise ValueError(f"none of the {count} training images can be read: look at their folder")

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples))
        return int(self._permutation(epoch)[place])

    def gathered_skips(self) -> list[str]:
        """The ids of the examples that any process has skipped."""
        return sorted(set(gather_object(sorted(self.skipped))))

    def names(self, step: int) -> list[str]:
        """The ids of the examples of a global batch."""
        start = step * self.batch_size
        return [self.examples[self._index(position)].id for position in range(start, start + self.batch_size)]


class ValidationStream(Dataset):
    """Every example at every t of a fixed grid, with fixed noise: validation losses of two checkpoints are comparable."""

    def __init__(self, examples: Sequence[Example], encode: Callable[[Example], dict], *, grid: int = 4, seed: int = 0):
        self.examples, self.encode, self.grid, self.seed = examples, encode, grid, seed

    def __len__(self) -> int:
        return len(self.examples) * self.grid

    def __getitem__(self, position: int) -> dict:
        index, k = divmod(position, self.grid)
        return self.encode(self.examples[index]) | {"noise": (self.seed, -1 - k, index), "stratum": (k, self.grid)}
