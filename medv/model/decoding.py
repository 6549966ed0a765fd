"""The network as a sampling call uses it: only the rows that are asked for, and only what a cache policy recomputes.

A `Decoder` belongs to one call. It embeds the prompt (and looks at its images) once, computes the last layer's queries,
output and MLP and the head for the wanted columns alone, and keeps keys and values [B, H, T, D] where the policy says so
(see `medv.diffusion.caching`). Everything is composed of the stock Llama's own submodules, in its order of operations: with
`NoCache` the logits are those of `MedVForMaskedDiffusion.forward` up to rounding. It decides nothing about tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from medv.diffusion.caching import CachePolicy, NoCache

Columns = slice | torch.Tensor  # columns of a canvas: the same for all rows, or int64 [B, K]
HEAD_PIECE = 2048  # tokens of the vocabulary whose weights stay in a CPU's cache


@dataclass
class _Stream:
    """The canvas with one prompt: the question, or (for guidance) masks in its place."""

    prompt: torch.Tensor  # [B, P, D] embeddings
    block: int = -1  # where the block of the last forward begins
    step: int = 0  # forwards in that block
    keys: list[torch.Tensor] = field(default_factory=list)  # a layer: [B, H, T, D]
    values: list[torch.Tensor] = field(default_factory=list)
    graphs: dict[tuple[int, int], "_Graph"] = field(default_factory=dict)


class Decoder:
    """A denoiser (see `medv.diffusion.sampler.Denoiser`) for the canvases of one sampling call.

    `refreshes` counts the forwards that filled a cache. With `graphs` the forwards between refreshes are captured as CUDA
    graphs, one a block, and replayed; they then always give all columns of the block.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: torch.Tensor,
        gen_length: int,
        *,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        cache: CachePolicy | None = None,
        graphs: bool = False,
    ):
        """prompt [B, P] int64 and attention_mask [B, P], left-padded; image_features as `MedVModel.embed` takes them."""
        if graphs and prompt.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, and the prompt is on {prompt.device}: leave graphs off")
        self.tower, self.head = model.model.language_model, model.lm_head
        self.cache, self.graphs, self.refreshes = cache or NoCache(), graphs, 0
        self.width, self.length = prompt.shape[1], prompt.shape[1] + gen_length
        mask = prompt.new_full((1, 1), model.config.mask_token_id)
        embeds = model.model.embed(prompt, image_features)  # [B, P, D]
        self.streams = {
            False: _Stream(embeds),
            True: _Stream(model.get_input_embeddings()(mask).expand_as(embeds)),
        }
        self.mask, positions = None, torch.arange(self.length, device=prompt.device)[None]  # [1, T]
        if attention_mask is not None and not attention_mask.all():
            seen = torch.cat([attention_mask, attention_mask.new_ones(len(prompt), gen_length)], dim=1)  # [B, T]
            positions = (seen.long().cumsum(dim=1) - 1).clamp_min(0)  # padding moves no token
            self.mask = self._key_mask(seen, embeds)
        self.rope = self.tower.rotary_emb(embeds, position_ids=positions)  # cos and sin, [1 or B, T, D_head] each

    @property
    def static(self) -> bool:
        """Whether shapes should stay the same from forward to forward within a block."""
        return self.graphs and self._keeps

    def _key_mask(self, seen: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor | None:
        """What the attention implementation wants for keys [B, T], for any number of queries: [B, 1, 1, T], or [B, T]."""
        query, keys = embeds[:, :1], embeds[:, :1].expand(-1, self.length, -1)
        return create_bidirectional_mask(
            self.tower.config, inputs_embeds=query, attention_mask=seen, encoder_hidden_states=keys
        )

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows [B'] of the batch alone."""
        self.mask = self.mask if self.mask is None else self.mask[rows]
        self.rope = tuple(part if len(part) == 1 else part[rows] for part in self.rope)
        for stream in self.streams.values():
            stream.prompt = stream.prompt[rows]
            stream.keys = [part[rows] for part in stream.keys]
            stream.values = [part[rows] for part in stream.values]
            stream.graphs = {}  # they hold the old addresses

    def __call__(
        self,
        canvas: torch.Tensor,
        columns: slice,
        *,
        unconditional: bool = False,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, K, V] of the block `columns` of the canvas [B, T], or of `positions` [B, K] (int64, within it) alone."""
        stream = self.streams[unconditional]
        if stream.block != columns.start:
            stream.block, stream.step, stream.graphs = columns.start, 0, {}
        refresh = self.cache.refreshes(stream.step)
        stream.step += 1
        window = slice(0, self.length) if refresh else self.cache.window(columns, self.length)
        wanted = columns if positions is None else positions
        self.refreshes += refresh and self._keeps
        if self.static and not refresh:
            return self._replay(stream, canvas[:, window], window, columns)
        return self._logits(stream, canvas[:, window], window, wanted, refresh)

    @property
    def _keeps(self) -> bool:
        return not isinstance(self.cache, NoCache)

    def _replay(self, stream: _Stream, ids: torch.Tensor, window: slice, columns: slice) -> torch.Tensor:
        key = (window.start, window.stop)
        if key not in stream.graphs:
            stream.graphs[key] = _Graph(lambda ids: self._logits(stream, ids, window, columns, False), ids)
        return stream.graphs[key](ids)

    def _logits(
        self, stream: _Stream, ids: torch.Tensor, window: slice, wanted: Columns, refresh: bool
    ) -> torch.Tensor:
        """Recompute the `window`, whose tokens are `ids` [B, W], and give the logits [B, K, V] of the wanted columns in it."""
        given = max(0, self.width - window.start)  # columns of the window that belong to the prompt
        states = self.tower.embed_tokens(ids[:, given:])
        if given:
            states = torch.cat([stream.prompt[:, window.start :], states], dim=1)  # [B, W, D]
        layers = self.tower.layers[: self.tower.config.num_hidden_layers]
        for index, layer in enumerate(layers):
            rows = wanted if index == len(layers) - 1 else window
            states = self._layer(stream, index, layer, states, window, rows, refresh)
        return vocabulary_logits(self.head, self.tower.norm(states))

    def _layer(
        self,
        stream: _Stream,
        index: int,
        layer: nn.Module,
        states: torch.Tensor,
        window: slice,
        rows: Columns,
        refresh: bool,
    ) -> torch.Tensor:
        """One decoder layer: keys and values of the window's states [B, W, D], the output [B, K, D] of the `rows` in it."""
        attention = layer.self_attn
        normed = layer.input_layernorm(states)
        keys = self._rotated(_heads(attention, attention.k_proj(normed)), window)  # [B, H, W, D_head]
        values = _heads(attention, attention.v_proj(normed))
        if self._keeps:
            keys, values = self._remember(stream, index, keys, values, window, refresh)  # [B, H, T, D_head]
        own = _shifted(rows, -window.start)
        states, normed = _take(states, own), _take(normed, own)
        queries = self._rotated(_heads(attention, attention.q_proj(normed)), rows)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(
            attention,
            queries,
            keys,
            values,
            self.mask,
            dropout=0.0,
            scaling=attention.scaling,
            is_causal=False,
        )
        states = states + attention.o_proj(mixed.flatten(2))
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def _remember(
        self, stream: _Stream, index: int, keys: torch.Tensor, values: torch.Tensor, window: slice, refresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write into the buffers of a layer, and give all keys and values."""
        if index == len(stream.keys):
            stream.keys.append(torch.empty_like(keys, memory_format=torch.contiguous_format))
            stream.values.append(torch.empty_like(values, memory_format=torch.contiguous_format))
        stream.keys[index][:, :, window] = keys
        stream.values[index][:, :, window] = values
        # The fresh tensors lie in memory as they do without a cache, so that a refresh gives the very same bits.
        return (keys, values) if refresh else (stream.keys[index], stream.values[index])

    def _rotated(self, heads: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Rotary positions on [B, H, K, D_head], in the arithmetic of `apply_rotary_pos_emb`."""
        cos, sin = (_take(part, columns)[:, None] for part in self.rope)
        return heads * cos + rotate_half(heads) * sin


def vocabulary_logits(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`head(states)` [B, K, V] of states [B, K, D], equal up to rounding.

    The rows are few and the vocabulary is large: a CPU's matrix library takes up to twice as long for that as for the
    transposed product, piece by piece. Anything but a plain linear head on a CPU is called as it is.
    """
    if states.device.type != "cpu" or type(head) is not nn.Linear or head.bias is not None or torch.is_grad_enabled():
        return head(states)
    flat = states.flatten(0, 1)  # [B * K, D]
    logits = flat.new_empty(len(flat), len(head.weight))  # [B * K, V]
    for start in range(0, len(head.weight), HEAD_PIECE):
        piece = head.weight[start : start + HEAD_PIECE]
        logits[:, start : start + HEAD_PIECE] = (piece @ flat.T).T
    return logits.view(*states.shape[:-1], -1)


def _heads(attention: nn.Module, projected: torch.Tensor) -> torch.Tensor:
    """[B, K, H * D_head] -> [B, H, K, D_head]."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _shifted(columns: Columns, by: int) -> Columns:
    return slice(columns.start + by, columns.stop + by) if isinstance(columns, slice) else columns + by


def _take(states: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Columns of states [B or 1, T, D]."""
    if isinstance(columns, slice):
        return states[:, columns]
    rows, depth = len(columns), states.shape[-1]
    return states.expand(rows, -1, -1).gather(1, columns[..., None].expand(-1, -1, depth))


class _Graph:
    """A forward as a CUDA graph: the same kernels on the same addresses, with new token ids."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor):
        self.ids = ids.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels choose and allocate their workspaces outside the capture
            for _ in range(2):
                forward(self.ids)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = forward(self.ids)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits
