"""How sure a prediction is: the log-probability of a token, in float32 that keeps its digits where p is close to 1.

log p = l - l_best - log1p(sum over v != best of exp(l_v - l_best)). Near p = 1 this resolves 1 - p down to 1e-38, where a
float32 softmax is exactly 1 from a gap of 16.6 nats on and a float64 softmax from 36.7: predictions that those tie are
still ranked. All samplers rank by it. It knows logits only.
"""

from collections.abc import Callable
from functools import cache

import torch


def log_confidence(logits: torch.Tensor, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [...] int64 and their log-probabilities [...] float32 under softmax(logits [..., V]), logits float32.

    Without `tokens` the most probable ones are taken. The logits are used up: their memory is the workspace.
    """
    top, best = logits.max(dim=-1, keepdim=True)
    chosen = top if tokens is None else logits.gather(-1, tokens[..., None])
    rest = logits.sub_(top).scatter_(-1, best, -torch.inf).exp_().sum(dim=-1, keepdim=True)
    score = chosen - top - rest.log1p()
    return (best if tokens is None else tokens[..., None])[..., 0], score[..., 0]


def best_allowed(logits: torch.Tensor, taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_confidence` of the most probable tokens under logits [..., V] + taken [V], of which nothing is changed.

    taken: float32, -inf where a token may not be written. Written for a compiler, which reads half-precision logits twice and
    keeps no copy of them.
    """
    allowed = logits.float() + taken
    top = allowed.amax(dim=-1, keepdim=True)
    best = allowed.argmax(dim=-1, keepdim=True)
    places = torch.arange(logits.shape[-1], device=logits.device)
    rest = torch.where(places == best, 0.0, (allowed - top).exp()).sum(dim=-1)
    return best[..., 0], -rest.log1p()


@cache
def compiled_best() -> Callable:
    """`best_allowed` compiled, once in a process."""
    return torch.compile(best_allowed)
