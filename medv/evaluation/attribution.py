"""Where it looked: how much each region of a picture mattered for each token of an answer, by occlusion.

A token that a forward wrote is predicted again on the canvas as it was before that forward (replayed from the trace), with the
whole picture and with each region hidden; by how many nats its log-probability drops is what the region contributed. Neither
attention weights nor gradients are read: whatever the network computes is measured, at (regions + 1) canvases for each forward
of the answer, without a cache. Log-probabilities are those of the model, without temperature, guidance or suppressed tokens.

A region is hidden in one of two ways. "pixels": it is flattened to its own mean color before the vision tower, which takes away
what is drawn there and adds no patch that could be taken for a finding. "tokens": after the tower, the visual tokens that look
at it are replaced by the mean of all others; what the tower has carried from there to its neighbors stays. On validation
phantoms of the tiny model the first lands on the lesion more often (notebook 42 shows both), so it is the default; the own mean
color was chosen there, too, before that of the surroundings, that of the rest of the picture, gray, and noise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from medv import limits
from medv.data.example import Turn
from medv.data.images import as_picture
from medv.diffusion.trace import COMMIT, Event, Trace
from medv.evaluation.answering import Answerer
from medv.model.decoding import Decoder
from medv.model.devices import computes_on
from medv.model.views import ViewPlan

WAYS = ("pixels", "tokens")
MOST = 9
"""Regions along a side at most."""


@dataclass(frozen=True)
class Regions:
    """A picture cut into rows * columns equal boxes, numbered row by row."""

    rows: int
    columns: int

    @classmethod
    def of(cls, plan: ViewPlan, width: int, height: int, most: int = MOST) -> "Regions":
        """A region for each visual token of the base view, or `most` along a side where there are more."""
        longest = max(width, height)
        seen = [size / longest if plan.aspect == "pad" else 1.0 for size in (height, width)]  # share of the view
        return cls(*(min(most, max(1, round(plan.side * share))) for share in seen))

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """left, top, right and bottom of each region as fractions of the picture."""
        r, c = self.rows, self.columns
        return [(x / c, y / r, (x + 1) / c, (y + 1) / r) for y in range(r) for x in range(c)]

    def pixels(self, width: int, height: int) -> list[tuple[slice, slice]]:
        """The pixels [rows, columns] of each region in a picture of this size."""
        return [
            (slice(round(y0 * height), round(y1 * height)), slice(round(x0 * width), round(x1 * width)))
            for x0, y0, x1, y1 in self.boxes
        ]

    def owners(self, places: torch.Tensor) -> torch.Tensor:
        """The region of each place (x, y) [T, 2], int64 [T]; -1 outside the picture and for NaN."""
        inside = ((places >= 0) & (places < 1)).all(dim=1)
        x, y = (places.nan_to_num() * places.new_tensor([self.columns, self.rows])).long().unbind(dim=1)
        return torch.where(inside, y * self.columns + x, -1)


@dataclass(frozen=True)
class Occlusions:
    """The visual tokens of a picture, whole and without each of its regions: features [1 + regions, T', D]."""

    regions: Regions
    features: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def of(
        cls, answerer: Answerer, picture: Image.Image, *, hide: str = "pixels", most: int = MOST, rows: int = 24
    ) -> "Occlusions":
        """Hide each region in one of `WAYS`; `rows` pictures pass through the tower at once. With several views of a picture
        (anyres) a region is hidden in all of them. Raises ValueError for another way.
        """
        limits.named("way to hide a region", hide, WAYS)
        picture, processor, model = as_picture(picture), answerer.processor, answerer.model.model
        plan = processor.view_plan
        regions = Regions.of(plan, *picture.size, most)
        pictures = [picture, *(_flattened(picture, *box) for box in regions.pixels(*picture.size) if hide == "pixels")]
        place, parts = computes_on(model.vision_tower), []
        for start in range(0, len(pictures), rows):
            part = pictures[start : start + rows]
            layouts = processor.layouts(part)
            pixels = processor.pixels(part).to(place)
            found = model.get_image_features(pixels, None if layouts is None else layouts.to(place))
            parts.append(found.reshape(len(part), -1, found.shape[-1]))
        features = torch.cat(parts)
        if hide == "tokens":
            owners = regions.owners(plan.places(*picture.size)).to(features.device)
            features = torch.cat([features, _without(features[0], owners, regions.rows * regions.columns)])
        return cls(regions, features)


@dataclass(frozen=True)
class Attribution:
    """What each region contributed to each of n tokens. events: when each was written, by position.

    log_probability float32 [n]: of the token, with the whole picture. drops float32 [n, rows, columns]: by how many nats it
    falls without the region; below 0 the region spoke against the token.
    """

    events: tuple[Event, ...]
    regions: Regions
    log_probability: torch.Tensor
    drops: torch.Tensor

    def of(self, positions: Iterable[int]) -> torch.Tensor:
        """The drops of several tokens together, [rows, columns]: of the product of their probabilities."""
        wanted = set(positions)
        return self.drops[[event.position in wanted for event in self.events]].sum(dim=0)


def written(trace: Trace, positions: Iterable[int] | None = None) -> tuple[Event, ...]:
    """The commits of one row that stand at the end, by position; of `positions` alone where these are given."""
    last = {event.position: event for event in trace.events}
    wanted = last.keys() if positions is None else set(positions)
    return tuple(last[place] for place in sorted(last) if last[place].kind == COMMIT and place in wanted)


@torch.inference_mode()
def attribute(
    answerer: Answerer,
    shown: Occlusions,
    question: str,
    trace: Trace,
    *,
    positions: Iterable[int] | None = None,
    rows: int = 24,
    on_step: Callable[[int, int], None] | None = None,
) -> Attribution:
    """The attribution of the tokens of an answer, or of those at `positions` of the response.

    shown: of the picture that was asked about. trace: of the answer, as `Answerer.ask` gives it. rows: canvases computed at
    once at most; no result depends on it beyond rounding. on_step: called with the number of canvases done and of all. Raises
    ValueError for a trace of several rows or without such a token.
    """
    if len({event.row for event in trace.events}) > 1:
        raise ValueError("the trace has several rows: take trace.of_row(row)")
    events = written(trace, positions)
    if not events:
        raise ValueError("the trace has no token there: an autoregressive twin leaves none, and positions count from 0")
    model, features = answerer.model, shown.features
    ids = answerer.processor.encode_turns((Turn("user", question.strip()),), image_tokens=features.shape[1])
    prompt = torch.tensor([ids], device=computes_on(model.get_input_embeddings()))
    of_step: dict[int, list[int]] = {}
    for place, event in enumerate(events):
        of_step.setdefault(event.step, []).append(place)
    canvases = {step: prompt.new_tensor(trace.replay(step - 1, events[0].row)) for step in of_step}
    jobs = [(step, region) for step in of_step for region in range(len(features))]
    scores = torch.zeros(len(events), len(features))
    training = model.training
    model.eval()
    rows = -(-len(jobs) // -(-len(jobs) // rows))  # as many times, about equally many
    for start in range(0, len(jobs), rows):
        part = jobs[start : start + rows]
        widest = max(len(of_step[step]) for step, _ in part)
        places = [(of_step[step] * widest)[:widest] for step, _ in part]  # [n, K], repeated where a step wrote fewer
        at, tokens = (prompt.new_tensor([[events[p][field] for p in row] for row in places]) for field in (2, 3))
        prompts, seen = prompt.expand(len(part), -1), features[[region for _, region in part]]
        canvas = torch.cat([prompts, torch.stack([canvases[step] for step, _ in part])], dim=1)
        decoder = Decoder(model, prompts, trace.gen_length, image_features=seen.flatten(0, 1))
        logits = decoder(canvas, slice(prompt.shape[1], None), positions=prompt.shape[1] + at).float()
        found = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0].cpu()  # [n, K]
        for row, (_, region) in enumerate(part):
            scores[places[row], region] = found[row]
        if on_step is not None:
            on_step(start + len(part), len(jobs))
    model.train(training)
    drops = (scores[:, :1] - scores[:, 1:]).reshape(-1, shown.regions.rows, shown.regions.columns)
    return Attribution(events, shown.regions, scores[:, 0], drops)


def _flattened(picture: Image.Image, rows: slice, columns: slice) -> Image.Image:
    """The picture with one region in its own mean color."""
    pixels = np.array(picture.convert("RGB"))
    if pixels[rows, columns].size:
        pixels[rows, columns] = pixels[rows, columns].mean(axis=(0, 1)).round()
    return Image.fromarray(pixels)


def _without(features: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Visual tokens [T, D] with those of each region replaced by the mean of all others in the picture, [count, T, D]."""
    inside = owners == torch.arange(count, device=owners.device)[:, None]  # [R, T]
    outside = ((owners >= 0) & ~inside).to(features)
    mean = outside @ features / outside.sum(dim=1, keepdim=True).clamp_min(1)  # [R, D]
    return torch.where(inside[..., None], mean[:, None], features)
