"""The forward process: tokens of a response are hidden at time t (Eq. 1 and 2 of the paper).

All randomness is a function of (seed, step, sample index): a sample gets the same noise in any batch, number of processes or
resumed run. Torch's global generator is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

EPS = 1e-3  # the smallest masking probability; keeps the weight 1 / p of the loss finite


@dataclass(frozen=True)
class Corruption:
    """A corrupted batch: `ids` [B, L] with masks in it, `masked` [B, L] bool, `p_mask` [B] float32."""

    ids: torch.Tensor
    masked: torch.Tensor
    p_mask: torch.Tensor


def noise_generator(seed: int, step: int, index: int) -> torch.Generator:
    """A CPU generator that depends on its three arguments alone."""
    digest = blake2b(f"{seed}:{step}:{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(
    seed: int, step: int, indices: Sequence[int], length: int, *, strata: Sequence[tuple[int, int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw t ~ U(0, 1) [B] and u ~ U(0, 1) [B, length], both float32 on the CPU, one generator per sample.

    With `strata`, a pair (k, n) per sample, t is uniform in the k-th of n equal parts of the interval, so that the n samples
    of a global batch cover it evenly. The effect on the variance of the loss depends on the normalization; notebook 02
    measures it.
    """
    times, uniforms = [], []
    for row, index in enumerate(indices):
        generator = noise_generator(seed, step, index)
        t = torch.rand(1, generator=generator)
        if strata is not None:
            k, n = strata[row]
            t = (t + k) / n
        times.append(t)
        uniforms.append(torch.rand(length, generator=generator))
    return torch.cat(times), torch.stack(uniforms)  # [B], [B, L]


def masking_probability(t: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """p = (1 - eps) t + eps, the probability that a token is hidden at time t."""
    return (1 - eps) * t + eps


def corrupt(
    ids: torch.Tensor, targets: torch.Tensor, t: torch.Tensor, u: torch.Tensor, mask_token_id: int, *, eps: float = EPS
) -> Corruption:
    """Hide each target token with probability p(t): Eq. 1.

    ids [B, L] int64; targets [B, L] bool, the positions that may be hidden (the response; the prompt stays clean);
    t [B]; u [B, L] the uniforms that decide. Raises ValueError where a mask already stands in `ids` as a target.
    """
    if (ids[targets] == mask_token_id).any():
        raise ValueError(f"the response already holds the mask token {mask_token_id}: clean text is needed to corrupt it")
    p_mask = masking_probability(t, eps)  # [B]
    masked = (u < p_mask[:, None]) & targets  # [B, L]
    return Corruption(ids=ids.masked_fill(masked, mask_token_id), masked=masked, p_mask=p_mask)
