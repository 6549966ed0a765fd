"""The small widgets of the tutorials: drag the time t and see what is masked (Eq. 1) and what each masked token weighs
(Eq. 4); see what an aspect mode does to a picture.

Each is a still where nothing can be dragged (a page made by papermill): its first state is stored as HTML beside the widget.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape

import ipywidgets as widgets
import torch
from PIL import Image

from medv.companion.explorer.view import png, style
from medv.companion.explorer.widgets import FULL
from medv.companion.figures.traces import word_of
from medv.diffusion.corruption import corrupt, draw_noise, masking_probability
from medv.diffusion.loss import NORMALIZATIONS, token_weights
from medv.model.processing import MedVProcessor
from medv.model.views import ASPECTS, ViewPlan

DARK = "background:#1b1b1b;color:#1b1b1b"


class Still(widgets.VBox):
    """Controls above one HTML view, with that view as it is when displayed for readers that run no widget."""

    def __init__(self, controls: Sequence[widgets.Widget], shown: widgets.HTML):
        self.shown = shown
        super().__init__([widgets.HTML(style(), layout={"display": "none"}), *controls, shown], layout=FULL)
        self.add_class("medv")

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/html"] = f'{style()}<div class="medv">{self.shown.value}</div>'
        return bundle


def _dragged(page: Callable[[float, int], str]) -> Still:
    """A slider of the time t above `page(t, draw)`, an HTML text; "another draw" counts `draw` up."""
    time = widgets.FloatSlider(0.5, min=0, max=1, step=0.01, description="time t", layout={"width": "min(560px, 95%)"})
    time.add_class("medv-drag-t")
    again = widgets.Button(description="another draw")
    shown, draw = widgets.HTML(page(time.value, 0), layout=FULL), [0]

    def show(_=None) -> None:
        shown.value = page(time.value, draw[0])

    def redraw(_) -> None:
        draw[0] += 1
        show()

    time.observe(show, "value")
    again.on_click(redraw)
    return Still([widgets.HBox([time, again])], shown)


def forward_process(processor: MedVProcessor, question: str, answer: str, *, seed: int = 0) -> Still:
    """Drag t and watch the tokens of an answer mask (Eq. 1); "another draw" takes new uniforms, the question never masks."""
    word = word_of(processor.tokenizer)
    prompt, response = (processor.tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
    ids = torch.tensor([prompt + response])  # [1, T]
    targets = torch.tensor([[False] * len(prompt) + [True] * len(response)])

    def page(t: float, draw: int) -> str:
        _, u = draw_noise(seed, draw, [0], ids.shape[1])
        noise = corrupt(ids, targets, torch.tensor([t]), u, processor.special.mask)
        masked = noise.masked[0].tolist()
        boxes = "".join(_token(word(token), hidden) for token, hidden in zip(ids[0].tolist(), masked, strict=True))
        told = f"t = {t:.2f}: {sum(masked)} of the {len(response)} tokens of the answer are masked"
        return f'<p class="medv-said">{told}</p><div class="medv-canvas">{boxes}</div>'

    return _dragged(page)


def loss_weights(lengths: Sequence[int] = (4, 12), *, seed: int = 0) -> Still:
    """Drag t and see what one masked token weighs in the loss of a batch, under each normalization.

    The batch holds one answer of each of `lengths` tokens, all at the same t; the bars are `token_weights`, the library's own.
    Raises ValueError where an answer has no token.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths are {tuple(lengths)}: each answer needs at least one token")
    targets = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, L]

    def page(t: float, draw: int) -> str:
        _, u = draw_noise(seed, draw, list(range(len(lengths))), targets.shape[1])  # [B, L]
        p_mask = masking_probability(torch.full((len(lengths),), t))  # [B]
        masked = (u < p_mask[:, None]) & targets  # [B, L]
        counts = zip(masked.sum(dim=1).tolist(), lengths, strict=True)
        told = " and ".join(f"{count} of {length} tokens" for count, length in counts)
        weights = {name: _weight_by_answer(masked, targets, p_mask, name) for name in NORMALIZATIONS}
        told = f"t = {t:.2f}, 1/p = {1 / p_mask[0]:.3g}; masked: {told}"
        return f'<p class="medv-said">{told}</p>{_weight_table(weights, lengths)}'

    return _dragged(page)


def _weight_by_answer(
    masked: torch.Tensor, targets: torch.Tensor, p_mask: torch.Tensor, normalization: str
) -> list[float | None]:
    """What each masked token of each answer weighs; None for an answer without one."""
    spread = torch.zeros(masked.shape)  # [B, L]
    spread[masked] = token_weights(masked, targets, p_mask, normalization)
    return [float(row.max()) if hidden.any() else None for row, hidden in zip(spread, masked, strict=True)]


def _weight_table(weights: dict[str, list[float | None]], lengths: Sequence[int]) -> str:
    """A row for each normalization, a bar for each answer; a full bar is a weight of 1 or more."""
    head = "".join(f"<th>answer of {length} tokens</th>" for length in lengths)
    rows = ""
    for name, values in weights.items():
        bars = "".join(f"<td>{'nothing masked' if value is None else _bar(value)}</td>" for value in values)
        rows += f"<tr><th title='{escape(NORMALIZATIONS[name], quote=True)}'>{name}</th>{bars}</tr>"
    return f'<table class="medv-weights"><tr><th>one masked token weighs</th>{head}</tr>{rows}</table>'


def _bar(value: float) -> str:
    return f'<span class="medv-bar"><i style="width:{min(value, 1):.1%}"></i></span> {value:.3g}'


def _token(text: str, masked: bool) -> str:
    start = " start" if text.startswith(" ") else ""
    look, state = (DARK, "masked") if masked else ("", "visible")
    shown = escape(text.strip() or text)
    return f'<span class="medv-cell{start}" style="{look}" title="{state}"><b>{shown}</b></span>'


def aspect_modes(picture: Image.Image, plan: ViewPlan) -> Still:
    """The views of a picture, and how many visual tokens they become, at each aspect mode of `plan`'s sizes and grid.

    "squeeze" changes the shape of the picture first, since the mode matters where a picture is not square.
    """
    mode = widgets.ToggleButtons(options=list(ASPECTS), value=plan.aspect, description="aspect")
    shape = widgets.FloatSlider(1.6, min=0.3, max=3, step=0.1, description="width / height")
    shape.style.description_width, shape.layout.width = "100px", "min(480px, 95%)"
    shown = widgets.HTML(layout=FULL)

    def show(_=None) -> None:
        width, height = round(480 * shape.value**0.5), round(480 / shape.value**0.5)
        asked = picture.resize((width, height), Image.Resampling.BICUBIC)
        now = replace(plan, aspect=mode.value)
        layout = now.layout(width, height)
        tiles = f"base view and {layout.columns} x {layout.rows} tiles" if layout.columns else "one view"
        views = "".join(_view(view.resize((plan.size, plan.size))) for view in now.views(asked))
        told = f"{width} x {height} pixels, {mode.value}: {tiles}, {now.tokens(width, height):,} visual tokens"
        shown.value = f'<p class="medv-said">{told}</p><div class="medv-views">{_view(asked, 150)}<span>→</span>{views}</div>'

    mode.observe(show, "value")
    shape.observe(show, "value")
    show()
    return Still([mode, shape], shown)


def _view(picture: Image.Image, side: int = 84) -> str:
    data = base64.b64encode(png(picture, side)).decode()
    return f'<img alt="{picture.width} x {picture.height} pixels" src="data:image/png;base64,{data}">'
