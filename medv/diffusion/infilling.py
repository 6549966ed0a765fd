"""Infilling: a response of which some tokens are fixed from the beginning and the sampler writes the others.

The fixed tokens are in the canvas at every forward, those of later blocks too. They are never written over and never taken
back. A fixed stop token ends its row as a written one does: what is behind it is not part of the response, fixed or not, and
becomes the fill token. In front of a fixed token no stop token is written, which would cut it off. A block takes as many
forwards as it would without fixed tokens, but never more than it has open positions; one without any takes none.
"""

import torch

from medv.diffusion.blockwise import BlockwiseConfig
from medv.diffusion.trace import FIXED, Event, Events


def given_response(
    response: torch.Tensor | None, prompt: torch.Tensor, config: BlockwiseConfig, mask_token_id: int
) -> torch.Tensor | None:
    """The response [B, L] int64 on the prompt's device, or None where nothing is fixed.

    Raises ValueError for another shape or dtype and for a negative id.
    """
    if response is None:
        return None
    check_ids(response)
    wanted = (len(prompt), config.gen_length)
    if tuple(response.shape) != wanted:
        shape = f"{wanted[0]} rows and gen_length {wanted[1]} columns"
        raise ValueError(f"the response has the shape {tuple(response.shape)}: give it {shape}")
    return None if (response == mask_token_id).all() else response.to(prompt.device)


def check_ids(response: torch.Tensor, vocabulary: int | None = None) -> None:
    """Raises ValueError where a response is no int64 tensor or has an id that is not in a vocabulary of this size."""
    if not isinstance(response, torch.Tensor) or response.dtype != torch.int64:
        found = response.dtype if isinstance(response, torch.Tensor) else type(response).__name__
        raise ValueError(f"the response is of {found}: give a tensor of token ids, torch.int64")
    outside = response < 0 if vocabulary is None else (response < 0) | (response >= vocabulary)
    if outside.any():
        ids = "at least 0" if vocabulary is None else f"between 0 and {vocabulary - 1}"
        raise ValueError(f"the response has the id {int(response[outside][0])}: ids are {ids}")


def open_positions(
    response: torch.Tensor, mask_token_id: int, stops: torch.Tensor, min_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of a response [B, L] may be written, bool [B, L], and from which on a stop token may be, int64 [B].

    Open are the masks in front of the first fixed stop token.
    """
    masks, length = response == mask_token_id, response.shape[1]
    place = torch.arange(length, device=response.device).expand_as(response)
    end = place.masked_fill(~torch.isin(response, stops) | masks, length).amin(dim=1, keepdim=True)  # [B, 1]
    kept = ~masks & (place <= end)
    stops_from = (place + 1).masked_fill(~kept, 0).amax(dim=1).clamp_min(min_length)
    return masks & (place < end), stops_from


def fixed_events(response: torch.Tensor | None, mask_token_id: int) -> Events:
    """The fixed tokens for a `Trace`."""
    if response is None:
        return ()
    rows, positions = (response != mask_token_id).nonzero(as_tuple=True)
    places = zip(rows.tolist(), positions.tolist(), response[rows, positions].tolist(), strict=True)
    return tuple(Event(-1, *place, 1.0, FIXED) for place in places)
