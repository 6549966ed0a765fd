"""The training loss: cross-entropy at the masked positions, weighted by 1 / p (Eq. 3 and 4 of the paper).

Only masked positions reach the output head, and the gradient of their logits is written over the logits.
`full_cross_entropy` is the slow and obvious version, the reference of tests and benchmarks.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medv import limits

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
    limits.named("normalization", normalization, NORMALIZATIONS)
    rows = masked.nonzero()[:, 0]  # [M]
    if normalization == "masked":
        return torch.full((len(rows),), 1.0 / max(len(rows), 1), device=masked.device)
    if normalization == "masked_sample":
        counts = masked.sum(dim=1)  # [B]
        return (1.0 / (counts * len(counts)))[rows]  # [M]
    lengths = targets.sum(dim=1)  # [B]
    total = lengths * len(lengths) if normalization == "sample" else lengths.sum().expand_as(lengths)
    return (1.0 / (p_mask.float() * total))[rows]  # [M]


CHUNK = 1024  # positions whose logits may be in memory together
SMALL = 2**21  # up to so many logits the plain cross-entropy is as good
PIECE = 2**20  # float32 numbers that the softmax copies at a time, to fit a CPU's cache
CUDA_PIECE = 2**27  # the same on a GPU, where small pieces cost more than they save


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row in float32 without a copy of the logits: the gradient overwrites them.

    Torch refuses a second backward pass through the same graph, because a saved tensor was changed.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """logits [m, V], labels [m] -> float32 [m]."""
        pieces = _pieces(logits, labels)
        losses = torch.cat([F.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in pieces])  # [m]
        ctx.save_for_backward(logits, labels, losses + logits.gather(1, labels[:, None])[:, 0].float())
        return losses

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(softmax - one at the label) * grad, over the logits."""
        logits, labels, totals = ctx.saved_tensors
        for rows, ids, total, scale in _pieces(logits, labels[:, None], totals[:, None], grad[:, None]):
            share = rows.float()  # no copy where the rows are float32
            share.sub_(total).exp_().mul_(scale).scatter_add_(1, ids, -scale)
            rows.copy_(share)
        return logits, None


def _pieces(logits: torch.Tensor, *columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Logits and columns [m, ...] in groups of as many rows as the softmax takes at a time."""
    rows = max(1, (CUDA_PIECE if logits.is_cuda else PIECE) // logits.shape[-1])
    return zip(*(column.split(rows) for column in (logits, *columns)), strict=True)


def masked_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """sum_i weights_i * CE(head(hidden_i), labels_i), a float32 scalar.

    hidden [M, D] are the states of the masked positions, labels [M] int64. More than `chunk` positions are processed in chunks
    whose logits are recomputed in the backward pass: memory holds chunk * V logits instead of M * V. `head` must return new
    tensors: the backward pass overwrites them. With nothing masked the result is a zero that depends on `hidden`.

    In a process group every rank must call this: all call `head` equally often, with empty chunks if necessary, because
    ZeRO-3 gathers the weights of the head at each call.
    """

    def part(states: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = head(states)  # [m, V]
        if logits.numel() <= SMALL:
            losses = F.cross_entropy(logits.float(), ids, reduction="none")
        else:
            losses = _CrossEntropy.apply(logits, ids)
        return (losses * scale).sum()

    count = _most(max(1, -(-len(hidden) // chunk)), hidden.device)
    if count == 1:
        return part(hidden, labels, weights)
    starts = range(0, count * chunk, chunk)
    pieces = [[rows[start : start + chunk] for rows in (hidden, labels, weights)] for start in starts]
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()


def _most(count: int, device: torch.device) -> int:
    """The largest count over all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def full_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    masked: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """`masked_cross_entropy` as the reference computes it: float32 logits of every position, of which the masked are kept.

    hidden [B, L, D], labels and masked [B, L], weights [M]; returns the same float32 scalar.
    """
    logits = head(hidden).float()  # [B, L, V]
    return (F.cross_entropy(logits[masked], labels[masked], reduction="none") * weights).sum()
