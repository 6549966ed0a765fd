"""Cache policies: which columns of a canvas get new keys and values at a forward.

Attention in a masked-diffusion model is bidirectional, so one new token changes the keys and values of all layers but the first
at every position. A cache keeps old ones and is an approximation, unless it is refreshed at every forward. The denoiser of a
sampling call owns the tensors. Prefix and dual caches with block updates are those of Fast-dLLM (arXiv 2505.22618), the refresh
interval that of LLaDA-V's prefix cache, the vicinity that of dInfer (arXiv 2510.08666).
"""

from dataclasses import dataclass
from typing import Protocol

from medv import limits


class CachePolicy(Protocol):
    """The columns that a forward recomputes. Steps count the forwards of a block from 0."""

    def refreshes(self, step: int) -> bool:
        """Whether the whole canvas is recomputed at this step of a block."""

    def window(self, block: slice, length: int) -> slice:
        """The columns recomputed at a step without refresh; `length` is that of the canvas."""


@dataclass(frozen=True)
class NoCache:
    """Every forward recomputes the whole canvas: exact."""

    def refreshes(self, step: int) -> bool:
        """Always."""
        return True

    def window(self, block: slice, length: int) -> slice:
        """All columns."""
        return slice(0, length)


NO_CACHE = NoCache()


@dataclass(frozen=True)
class PrefixCache:
    """Keeps the prompt and finished blocks; the block and all masks after it are recomputed.

    refresh_interval: a full forward at the start of each block and after this number of forwards in it; None refreshes at
    the starts alone. 1 equals no cache.
    """

    refresh_interval: int | None = 32

    def __post_init__(self):
        if self.refresh_interval is not None:
            limits.whole("refresh_interval", self.refresh_interval, 1)

    def refreshes(self, step: int) -> bool:
        """At the first forward of a block and at every multiple of the interval."""
        return step == 0 or (self.refresh_interval is not None and step % self.refresh_interval == 0)

    def window(self, block: slice, length: int) -> slice:
        """From the block to the end."""
        return slice(block.start, length)


@dataclass(frozen=True)
class DualCache(PrefixCache):
    """Keeps all but the block. vicinity: columns before and after the block that are recomputed with it."""

    vicinity: tuple[int, int] = (0, 0)

    def __post_init__(self):
        super().__post_init__()
        if len(self.vicinity) != 2:
            raise ValueError(f"vicinity is {self.vicinity}: give two numbers of columns, before and after the block")
        for columns in self.vicinity:
            limits.whole("vicinity", columns, 0)

    def window(self, block: slice, length: int) -> slice:
        """The block and its vicinity."""
        before, after = self.vicinity
        return slice(max(0, block.start - before), min(length, block.stop + after))


CACHES: dict[str, CachePolicy] = {"none": NO_CACHE, "prefix": PrefixCache(), "dual": DualCache()}


def cache_named(name: str) -> CachePolicy:
    """One of CACHES. Raises ValueError for an unknown name."""
    limits.named("cache", name, CACHES)
    return CACHES[name]
