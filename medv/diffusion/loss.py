"""The training loss: cross-entropy at the masked positions, weighted by 1 / p (Eq. 3 and 4 of the paper).

Only masked positions reach the output head, so no logits of the whole sequence are ever built. The normalizations that
public code bases use are named here; "sample" is the one of LLaDA, LLaDA-V and LLaDA-MedV. This module knows hidden states
and a head that maps them to logits; it knows no transformer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NORMALIZATIONS = {
    "sample": "1/p, divided by the sample's own target length, mean over the batch (LLaDA guidelines, LLaDA-MedV)",
    "token": "1/p, divided by the number of target tokens of the batch (SMDM)",
    "masked_sample": "mean over a sample's masked tokens, then over the samples of the batch (short answers count fully)",
    "masked": "unweighted mean over the masked tokens of the batch (a lower-variance surrogate, not a likelihood bound)",
}


def token_weights(
    masked: torch.Tensor, targets: torch.Tensor, p_mask: torch.Tensor, normalization: str = "sample"
) -> torch.Tensor:
    """The weight of each masked token, float32 [M] in row-major order; the loss is sum(weights * cross-entropy).

    masked and targets [B, L] bool, p_mask [B]. Raises ValueError for an unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalization!r}: use one of {', '.join(NORMALIZATIONS)}")
    rows = masked.nonzero()[:, 0]  # [M]
    if normalization == "masked":
        return torch.full((len(rows),), 1.0 / max(len(rows), 1), device=masked.device)
    if normalization == "masked_sample":
        counts = masked.sum(dim=1)  # [B]
        return (1.0 / (counts * len(counts)))[rows]  # [M]
    lengths = targets.sum(dim=1)  # [B]
    total = lengths * len(lengths) if normalization == "sample" else lengths.sum().expand_as(lengths)
    return (1.0 / (p_mask.float() * total))[rows]  # [M]


def masked_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk: int = 1024,
) -> torch.Tensor:
    """sum_i weights_i * CE(head(hidden_i), labels_i), a float32 scalar.

    hidden [M, D] are the states of the masked positions, labels [M] int64. More than `chunk` positions are taken chunk by
    chunk and their logits recomputed in the backward pass, so memory holds chunk * V logits and not M * V. With nothing
    masked the result is a zero that still depends on `hidden`, so distributed ranks stay in step.
    """

    def part(states: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(head(states).float(), ids, reduction="none")  # [m]
        return (losses * scale).sum()

    if len(hidden) <= chunk:
        return part(hidden, labels, weights)
    pieces = zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
