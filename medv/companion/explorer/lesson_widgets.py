"""The widgets of the tutorials: the masked tokens at a time t (Eq. 1), the weight of each masked token in the loss (Eq. 4), and
the views of a picture at each aspect mode.

Each stores its first state as HTML beside the widget, for pages that run no widgets (those made by papermill).
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace

import ipywidgets as widgets
import torch
from PIL import Image

from medv.companion.explorer.view import HTML, png, style
from medv.companion.explorer.widgets import FULL
from medv.companion.figures.lessons import masked_answer
from medv.companion.figures.traces import word_of
from medv.diffusion.corruption import draw_noise, masking_probability
from medv.diffusion.loss import NORMALIZATIONS, token_weights
from medv.model.processing import MedVProcessor
from medv.model.views import ASPECTS, ViewPlan


class Still(widgets.VBox):
    """Controls above the HTML of `page()`, which is also what readers get that run no widget."""

    def __init__(self, controls: Sequence[widgets.Widget], page: Callable[[], str]):
        self.page, self.shown = page, widgets.HTML(page(), layout=FULL)
        super().__init__([widgets.HTML(style(), layout={"display": "none"}), *controls, self.shown], layout=FULL)
        self.add_class("medv")

    def show(self, *_) -> None:
        """Draw the page anew."""
        self.shown.value = self.page()

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/html"] = f'{style()}<div class="medv">{self.shown.value}</div>'
        return bundle


def _time_slider(page: Callable[[float, int], str]) -> Still:
    """A slider of the time t above `page(t, draw)`, an HTML text; "another draw" counts `draw` up."""
    time = widgets.FloatSlider(0.5, min=0, max=1, step=0.01, description="time t", layout={"width": "min(560px, 95%)"})
    time.add_class("medv-drag-t")
    again, draw = widgets.Button(description="another draw"), 0

    def redraw(_) -> None:
        nonlocal draw
        draw += 1
        still.show()

    still = Still([widgets.HBox([time, again])], lambda: page(time.value, draw))
    time.observe(still.show, "value")
    again.on_click(redraw)
    return still


def forward_process(processor: MedVProcessor, question: str, answer: str, *, seed: int = 0) -> Still:
    """Drag t and watch the tokens of an answer mask (Eq. 1); "another draw" takes new uniforms, the question never masks."""
    word = word_of(processor.tokenizer)

    def page(t: float, draw: int) -> str:
        ids, width, (masked,) = masked_answer(processor, question, answer, [t], seed=seed, draw=draw)
        status = f"t = {t:.2f}: {sum(masked)} of the {len(ids) - width} tokens of the answer are masked"
        return str(HTML.tokens(status, list(zip(map(word, ids), masked, strict=True))))

    return _time_slider(page)


def loss_weights(lengths: Sequence[int] = (4, 12), *, seed: int = 0) -> Still:
    """Drag t and see the weight of one masked token in the loss of a batch, under each normalization.

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
        tokens = " and ".join(f"{count} of {length} tokens" for count, length in counts)
        rows = []
        for name, meaning in NORMALIZATIONS.items():
            weights = torch.zeros(masked.shape)  # [B, L]
            weights[masked] = token_weights(masked, targets, p_mask, name)
            by_answer = [float(row.max()) if hidden.any() else None for row, hidden in zip(weights, masked, strict=True)]
            rows.append((name, meaning, by_answer))
        return str(HTML.weights(f"t = {t:.2f}, 1/p = {1 / p_mask[0]:.3g}; masked: {tokens}", lengths, rows))

    return _time_slider(page)


def aspect_modes(picture: Image.Image, plan: ViewPlan) -> Still:
    """The views of a picture and its visual tokens at each aspect mode of `plan`; a slider changes its shape first."""
    mode = widgets.ToggleButtons(options=list(ASPECTS), value=plan.aspect, description="aspect")
    shape = widgets.FloatSlider(1.6, min=0.3, max=3, step=0.1, description="width / height")
    shape.style.description_width, shape.layout.width = "100px", "min(480px, 95%)"

    def page() -> str:
        width, height = round(480 * shape.value**0.5), round(480 / shape.value**0.5)
        asked = picture.resize((width, height), Image.Resampling.BICUBIC)
        now = replace(plan, aspect=mode.value)
        layout = now.layout(width, height)
        tiles = f"base view and {layout.columns} x {layout.rows} tiles" if layout.columns else "one view"
        status = f"{width} x {height} pixels, {mode.value}: {tiles}, {now.tokens(width, height):,} visual tokens"
        sizes = [(asked, 150), *((view.resize((plan.size, plan.size)), 84) for view in now.views(asked))]
        images = [(image, base64.b64encode(png(image, side)).decode()) for image, side in sizes]
        return str(HTML.views(status, images))

    still = Still([mode, shape], page)
    for control in (mode, shape):
        control.observe(still.show, "value")
    return still
