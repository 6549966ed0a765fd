"""What a decoder layer computes between its matrix products, as functions that a compiler can fuse.

Each is the stock Llama's arithmetic. On a GPU such a step moves few bytes and costs a launch for every operation in it;
`torch.compile` makes one kernel of them. It knows tensors only.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F


def normed(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of states [..., D] with weight [D]."""
    return F.rms_norm(states, states.shape[-1:], weight, eps)


def normed_sum(
    states: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum [..., D] of a residual stream and what is added to it, and the RMSNorm of the sum."""
    total = states + change
    return total, F.rms_norm(total, total.shape[-1:], weight, eps)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on heads [B, K, H, D]; cos and sin [1 or B, K, 1, D], sin negative in its first half."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU between the projections of an MLP."""
    return F.silu(gate) * up


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def piece(function: Callable, compiled: bool) -> Callable:
    """The function, or what the compiler makes of it (once in a process, and again for other shapes)."""
    return _compiled(function) if compiled else function
