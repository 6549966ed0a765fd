"""The network during sampling: only the requested columns, and only what a cache policy recomputes.

A `Decoder` belongs to one sampling call. It embeds the prompt and its images once, computes the last layer's queries, output
and MLP and the head for the wanted columns alone, and keeps keys and values [B, T, H, D] where the policy says so
(see `medv.diffusion.caching`). It is composed of the stock Llama's submodules, in its order of operations: with `NoCache` the
logits are those of `MedVForMaskedDiffusion.forward` up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from medv.diffusion.caching import CachePolicy, NoCache
from medv.model.devices import computes_on

Columns = slice | torch.Tensor  # columns of a canvas: the same for all rows, or int64 [B, K]
HEAD_PIECE = 2048  # tokens of the vocabulary whose weights stay in a CPU's cache


def normed(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of states [..., D] with weight [D]."""
    return F.rms_norm(states, states.shape[-1:], weight, eps)


def normed_sum(states: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`states + more` [..., D] and its RMSNorm."""
    total = states + more
    return total, F.rms_norm(total, total.shape[-1:], weight, eps)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on heads [B, K, H, D]; cos and sin [1 or B, K, 1, D], sin negative in its first half."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU between the projections of an MLP."""
    return F.silu(gate) * up


def best_allowed(logits: torch.Tensor, penalty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens under logits [..., V] + penalty [V] and their log-probabilities; the logits are not changed.

    Written for a compiler, which reads half-precision logits twice and keeps no copy of them.
    """
    allowed = logits.float() + penalty
    top = allowed.amax(dim=-1, keepdim=True)
    best = allowed.argmax(dim=-1, keepdim=True)
    places = torch.arange(logits.shape[-1], device=logits.device)
    rest = torch.where(places == best, 0.0, (allowed - top).exp()).sum(dim=-1)
    return best[..., 0], -rest.log1p()


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def piece(function: Callable, compiled: bool) -> Callable:
    """The function, or its compiled form (compiled once per process and shape): one kernel instead of one per operation."""
    return _compiled(function) if compiled else function


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs of a device: every stream has a workspace of its own for matrix products."""
    return torch.cuda.Stream(device)


class Graph:
    """A function of tensors as a CUDA graph: captured once, replayed with new inputs of the same shapes by one launch.

    The function must have run before with inputs like these, so that no kernel is compiled, loaded or chosen in the capture.
    Its output is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor):
        self.inputs = tuple(part.clone() for part in inputs)
        device = inputs[0].device
        self.graph, side, main = torch.cuda.CUDAGraph(), _capture_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        # Not torch.cuda.graph: it would return all cached memory to the driver, which the next forward needs again.
        with torch.cuda.stream(side):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = function(*self.inputs)
            finally:
                self.graph.capture_end()
        main.wait_stream(side)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The output for these inputs."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


@dataclass
class _Stream:
    """The canvas with one prompt: the question, or (for guidance) masks in its place."""

    prompt: torch.Tensor  # [B, P, D] embeddings
    block: int = -1  # start of the block of the last forward
    step: int = 0  # forwards in that block
    keys: list[torch.Tensor] = field(default_factory=list)  # per layer: [B, T, H, D]
    values: list[torch.Tensor] = field(default_factory=list)
    graphs: dict[tuple[int, ...], "Graph | None"] = field(default_factory=dict)  # by shape; None: run once, to warm up


@dataclass(frozen=True)
class _Window:
    """The part of the canvas that a forward recomputes."""

    columns: Columns  # of the canvas: a slice or int64 [W]
    given: int  # columns that belong to the prompt
    wanted: Columns  # columns of the window whose logits are requested: a slice, int64 [K] or [B, K]
    full: bool  # the whole canvas, which fills a cache


class Decoder:
    """A denoiser (see `medv.diffusion.sampler.RowDenoiser`) for the canvases of one sampling call.

    `refreshes` counts the forwards that filled a cache. With `graphs` forwards are captured as CUDA graphs, one per width of
    the window, and replayed. `compiled` fuses the operations between the matrix products with `torch.compile`, which changes
    rounding in half precision.
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
        compiled: bool = False,
    ):
        """prompt [B, P] int64 and attention_mask [B, P], left-padded; image_features as `MedVModel.embed` takes them."""
        self.model, self.tower, self.head = model.model, model.model.language_model, model.lm_head
        self.layers = self.tower.layers[: self.tower.config.num_hidden_layers]
        self.cache, self.graphs, self.compiled, self.refreshes = cache or NoCache(), graphs, compiled, 0
        self.on_gpu = prompt.device.type == "cuda"
        if graphs and not self.on_gpu:
            raise ValueError(f"CUDA graphs need a CUDA device, and the prompt is on {prompt.device}: leave graphs off")
        if graphs and len({computes_on(layer.input_layernorm) for layer in self.layers}) > 1:
            raise ValueError("CUDA graphs need the whole model on one GPU, and this one is spread: leave graphs off")
        self.width, self.length = prompt.shape[1], prompt.shape[1] + gen_length
        embeds, self.rope, self.mask = self._seen(prompt, attention_mask, image_features)
        hidden = model.get_input_embeddings()(prompt.new_full((1, 1), model.config.mask_token_id))
        self.streams = {False: _Stream(embeds), True: _Stream(hidden.expand_as(embeds))}

    def begin(self, prompt: torch.Tensor, attention_mask: torch.Tensor | None, image_features: torch.Tensor | None) -> None:
        """Start another call of the same shape, padded if this one was: buffers and graphs are reused."""
        embeds, rope, mask = self._seen(prompt, attention_mask, image_features)
        for own, new in zip((self.streams[False].prompt, *self.rope), (embeds, *rope), strict=True):
            own.copy_(new)
        if mask is not None:
            self.mask.copy_(mask)
        for stream in self.streams.values():
            stream.block, stream.step = -1, 0
        self.refreshes = 0

    def _seen(
        self, prompt: torch.Tensor, attention_mask: torch.Tensor | None, image_features: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Embeddings of the prompt [B, P, D]; cos and sin of all columns [1 or B, T, 1, D_head]; the mask of the keys."""
        embeds = self.model.embed(prompt, image_features)
        mask, positions = None, torch.arange(self.length, device=prompt.device)[None]  # [1, T]
        if _padded(attention_mask):
            room = attention_mask.new_ones(len(prompt), self.length - self.width)
            seen = torch.cat([attention_mask, room], dim=1)  # [B, T]
            positions = (seen.long().cumsum(dim=1) - 1).clamp_min(0)  # padding moves no token
            query, keys = embeds[:, :1], embeds[:, :1].expand(-1, self.length, -1)
            mask = create_bidirectional_mask(
                self.tower.config, inputs_embeds=query, attention_mask=seen, encoder_hidden_states=keys
            )  # as the attention implementation wants it, for any number of queries: [B, 1, 1, T], [B, T] or None
            if mask is not None and mask.dtype == torch.bool and mask.dim() == 4:
                # Done once here, not in every layer: numbers to add, in rows whose length suits the kernels.
                room = embeds.new_zeros(*mask.shape[:-1], -(-self.length // 8) * 8)[..., : self.length]
                mask = room.masked_fill_(~mask, -torch.inf)
        cos, sin = self.tower.rotary_emb(embeds, position_ids=positions)
        half = sin.shape[-1] // 2
        return embeds, (cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]), mask

    @property
    def static(self) -> bool:
        """Whether shapes should stay the same within a block: every new shape costs a GPU tens of milliseconds."""
        return self.on_gpu or self.compiled or self.graphs

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for stream in self.streams.values() for part in (*stream.keys, *stream.values))

    def best(self, canvas: torch.Tensor, columns: slice, never: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable tokens at the columns, the ids `never` [N] left out, and their log-probabilities, [B, K] each."""
        logits = self(canvas, columns)
        penalty = torch.zeros(logits.shape[-1], device=logits.device).index_fill_(0, never, -torch.inf)
        return piece(best_allowed, self.compiled)(logits, penalty)

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these rows [B'] of the batch."""
        self.mask = self.mask if self.mask is None else self.mask[rows]
        self.rope = tuple(part if len(part) == 1 else part[rows] for part in self.rope)
        for stream in self.streams.values():
            stream.prompt = stream.prompt[rows]
            stream.keys = [part[rows] for part in stream.keys]
            stream.values = [part[rows] for part in stream.values]
            stream.graphs = {}  # they hold the old addresses

    def __call__(
        self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, K, V] of the block `columns` of the canvas [B, T], or of `positions` [B, K] (int64, within it) alone."""
        stream = self.streams[unconditional]
        if stream.block != columns.start:
            stream.block, stream.step = columns.start, 0
        refresh = self.cache.refreshes(stream.step)
        stream.step += 1
        columns = slice(*columns.indices(self.length)[:2])
        part = slice(0, self.length) if refresh else self.cache.window(columns, self.length)
        wanted = slice(columns.start - part.start, columns.stop - part.start) if positions is None else positions - part.start
        window = _Window(part, max(0, self.width - part.start), wanted, refresh)
        self.refreshes += refresh and self._keeps
        return (self._replay if self.graphs else self._logits)(stream, canvas[:, part], window).to(canvas.device)

    @property
    def _keeps(self) -> bool:
        return not isinstance(self.cache, NoCache)

    def _replay(self, stream: _Stream, ids: torch.Tensor, window: _Window) -> torch.Tensor:
        """`_logits` by a graph: the first forward of a shape runs as it is, the second is captured, later ones are replayed.

        The columns that change from block to block are an input of the graph: the wanted ones of a full forward, else the
        window's.
        """
        name = "wanted" if window.full else "columns"
        moving = getattr(window, name)
        place = torch.arange(moving.start, moving.stop, device=ids.device)
        key = (ids.shape[1], window.given, *((len(place),) if window.full else (window.wanted.start, window.wanted.stop)))

        def forward(ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return self._logits(stream, ids, replace(window, **{name: place}))

        if key not in stream.graphs:
            stream.graphs[key] = None
            return forward(ids, place)
        if stream.graphs[key] is None:
            stream.graphs[key] = Graph(forward, ids, place)
        return stream.graphs[key](ids, place)

    def _logits(self, stream: _Stream, ids: torch.Tensor, window: _Window) -> torch.Tensor:
        """Recompute the window, whose tokens are `ids` [B, W]; returns the logits [B, K, V] of its wanted columns."""
        states = self.tower.embed_tokens(ids[:, window.given :])
        if window.given:  # they stand at the end of the prompt
            states = torch.cat([stream.prompt[:, self.width - window.given :], states], dim=1)  # [B, W, D]
        change, mask, rope = None, self.mask, [_take(part, window.columns) for part in self.rope]
        for index, layer in enumerate(self.layers):
            device = computes_on(layer.input_layernorm)
            if states.device != device:  # the model is spread
                moved = (part if part is None else part.to(device) for part in (states, change, mask, *rope))
                states, change, mask, *rope = moved
            states, change = self._layer(stream, index, (states, change), window, rope, mask)
        return vocabulary_logits(self.head, self._normed(self.tower.norm, states, change)[1])

    def _layer(
        self,
        stream: _Stream,
        index: int,
        states: tuple[torch.Tensor, torch.Tensor | None],
        window: _Window,
        rope: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder layer: keys and values of the whole window, the output of all of it or, in the last, of what is wanted.

        States are [B, W, D] and what the layer before adds to them; so is the output.
        """
        layer, turn = self.layers[index], piece(rotated, self.compiled)
        attention, mlp = layer.self_attn, layer.mlp
        before, inner = self._normed(layer.input_layernorm, *states)
        keys = turn(_heads(attention, attention.k_proj(inner)), *rope)  # [B, W, H, D_head]
        values = _heads(attention, attention.v_proj(inner))
        if self._keeps:
            keys, values = self._remember(stream, index, keys, values, window)  # [B, T, H, D_head]
        if index == len(self.layers) - 1:
            before, inner, *rope = (_take(part, window.wanted) for part in (before, inner, *rope))
        queries = turn(_heads(attention, attention.q_proj(inner)), *rope)  # [B, K, H, D_head]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        heads = (part.transpose(1, 2) for part in (queries, keys, values))
        mixed, _ = attend(attention, *heads, mask, dropout=0.0, scaling=attention.scaling, is_causal=False)
        after, inner = self._normed(layer.post_attention_layernorm, before, attention.o_proj(mixed.flatten(2)))
        if self.compiled and mlp.config.hidden_act == "silu":
            return after, mlp.down_proj(piece(gated, True)(mlp.gate_proj(inner), mlp.up_proj(inner)))
        return after, mlp(inner)

    def _normed(self, norm: nn.Module, states: torch.Tensor, change: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`states + change` and its norm."""
        if hasattr(norm, "_hf_hook"):  # its weight may be elsewhere until it is called
            states = states if change is None else states + change
            return states, norm(states)
        how = (norm.weight, norm.variance_epsilon)
        if change is None:
            return states, piece(normed, self.compiled)(states, *how)
        return piece(normed_sum, self.compiled)(states, change, *how)

    def _remember(
        self, stream: _Stream, index: int, keys: torch.Tensor, values: torch.Tensor, window: _Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write into the buffers of a layer; returns all keys and values [B, T, H, D]."""
        if index == len(stream.keys):
            stream.keys.append(torch.empty_like(keys, memory_format=torch.contiguous_format))
            stream.values.append(torch.empty_like(values, memory_format=torch.contiguous_format))
        for buffer, fresh in ((stream.keys[index], keys), (stream.values[index], values)):
            if isinstance(window.columns, slice):
                buffer[:, window.columns] = fresh
            else:
                # Viewed as numbers of eight bytes: a kernel that copies one by one moves more at a time.
                wide = torch.int64 if buffer.shape[-1] * buffer.element_size() % 8 == 0 else buffer.dtype
                buffer.view(wide).index_copy_(1, window.columns, fresh.view(wide))
        # The fresh tensors have the memory layout they have without a cache, so that a refresh gives identical bits.
        return (keys, values) if window.full else (stream.keys[index], stream.values[index])


def vocabulary_logits(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`head(states)` [B, K, V] of states [B, K, D], up to rounding: for few rows and a large vocabulary the transposed product
    in pieces takes a CPU half as long. Anything but a plain linear head on a CPU is called directly.
    """
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.is_meta
    if states.device.type != "cpu" or not plain or torch.is_grad_enabled():
        return head(states)
    flat = states.flatten(0, 1)  # [B * K, D]
    logits = flat.new_empty(len(flat), len(head.weight))  # [B * K, V]
    for start in range(0, len(head.weight), HEAD_PIECE):
        rows = head.weight[start : start + HEAD_PIECE]
        logits[:, start : start + HEAD_PIECE] = (rows @ flat.T).T
    return logits.view(*states.shape[:-1], -1)


def _heads(attention: nn.Module, projected: torch.Tensor) -> torch.Tensor:
    """[B, K, H * D_head] -> [B, K, H, D_head]."""
    return projected.unflatten(-1, (-1, attention.head_dim))


def _take(states: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Columns (a slice, [K] or [B, K]) of states [B or 1, T, ...] as a copy: a compiler sees no views."""
    if isinstance(columns, slice):
        return states[:, columns].clone(memory_format=torch.contiguous_format)
    if columns.dim() == 1:
        return states.index_select(1, columns)
    where = columns.reshape(*columns.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.expand(len(columns), *states.shape[1:]).gather(1, where)


def _padded(attention_mask: torch.Tensor | None) -> bool:
    return attention_mask is not None and not bool(attention_mask.all())


_KEPT: WeakKeyDictionary[nn.Module, dict[tuple, Decoder]] = WeakKeyDictionary()
KEPT, KEPT_SHARE = 8, 8  # decoders kept per model for later calls; the share of a GPU that their keys and values may take


@contextmanager
def decoder_for(
    model: nn.Module,
    prompt: torch.Tensor,
    gen_length: int,
    *,
    attention_mask: torch.Tensor | None,
    image_features: torch.Tensor | None,
    cache: CachePolicy,
    graphs: bool,
    compiled: bool,
) -> Iterator[Decoder]:
    """A decoder for one call. With graphs it is the one of an earlier call of the same shape, if there is one.

    It is exclusive until the context ends, and is dropped when the weights move.
    """
    given = {"attention_mask": attention_mask, "image_features": image_features}
    if not graphs:
        yield Decoder(model, prompt, gen_length, cache=cache, compiled=compiled, **given)
        return
    kept = _KEPT.setdefault(model, {})
    weights = tuple(part.data_ptr() for part in model.parameters())
    key = (weights, model.dtype, tuple(prompt.shape), gen_length, cache, compiled, _padded(attention_mask))
    for stale in [other for other in kept if other[0] != weights]:
        del kept[stale]
    decoder = kept.pop(key, None)
    if decoder is None:
        decoder = Decoder(model, prompt, gen_length, cache=cache, graphs=True, compiled=compiled, **given)
    else:
        decoder.begin(prompt, **given)
    try:
        yield decoder
    except Exception:  # its buffers may be half written
        decoder = None
        raise
    finally:
        if decoder is not None and len(decoder.streams[False].prompt) == len(prompt):  # no row has left
            kept[key] = decoder
            room = torch.cuda.get_device_properties(prompt.device).total_memory // KEPT_SHARE
            while len(kept) > KEPT or sum(other.held_bytes for other in kept.values()) > room:
                del kept[next(iter(kept))]  # the oldest


def forget_decoders(model: nn.Module) -> None:
    """Drop the decoders that `decoder_for` keeps for this model."""
    _KEPT.pop(model, None)
