"""From examples to batches: ids, labels, padding and the noise of each sample.

The padding policy decides whether a model learns where to end:
"batch"    pad with end-of-text to the longest of the batch; pads are visible, hidden and scored (the reference; the loss of
           a sample then depends on its companions). In training the batch is the global one, however it is cut.
"fixed:N"  pad the last answer with end-of-text to N tokens, visible and scored, whatever the batch is; further padding is
           invisible.
"none"     padding is invisible and never scored.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from medv import limits
from medv.data.chat import IGNORED, LOSS_TOKENS, Encoded, SpecialTokens, encode_dialogue, encode_plain
from medv.data.example import Example, Turn
from medv.diffusion.corruption import draw_noise, noise_generator
from medv.model.looks import Looks, joined
from medv.model.processing import MedVProcessor

ENCODINGS = (*LOSS_TOKENS, "plain")
KEPT_DIALOGUES = 20_000


class Encoder:
    """Example -> {"input_ids", "labels", "answer_length"} and, with an image, the tensors of `looks` (by default new ones).

    loss_tokens is one of ENCODINGS: "official" or "response" (see `encode_dialogue`), or "plain" (`encode_plain`, the
    alignment stage of the reference: image, last answer, newline).
    """

    def __init__(self, processor: MedVProcessor, *, loss_tokens: str, max_length: int, looks: Looks | None = None):
        limits.named("loss_tokens", loss_tokens, ENCODINGS)
        self.processor, self.loss_tokens, self.max_length = processor, loss_tokens, max_length
        self.looks = looks or Looks(processor)
        self._encoded = lru_cache(maxsize=KEPT_DIALOGUES)(self._encode)

    def __call__(self, example: Example) -> dict:
        """Encode one example; raises ValueError naming it where it is longer than `max_length`."""
        image_tokens, tensors = self.looks(example)
        encoded = self._encoded(example.turns, image_tokens)
        if len(encoded.ids) > self.max_length:
            raise ValueError(
                f"example {example.id} has {len(encoded.ids)} tokens, more than the maximum of {self.max_length}: "
                "shorten it, or take Profile.with_recipe(stage, max_length=...)"
            )
        return {"input_ids": encoded.ids, "labels": encoded.labels, "answer_length": encoded.answer_length, **tensors}

    def _encode(self, turns: tuple[Turn, ...], image_tokens: int) -> Encoded:
        tokenizer = self.processor.tokenizer
        if self.loss_tokens == "plain":
            answer = next(turn.text for turn in reversed(turns) if turn.role == "assistant")
            return encode_plain(tokenizer, answer, image_tokens=image_tokens)
        options = {"system": self.processor.system_prompt, "loss_tokens": self.loss_tokens}
        return encode_dialogue(tokenizer, turns, image_tokens=image_tokens, **options)


class Collator:
    """A list of stream items -> the keyword arguments of `MedVForMaskedDiffusion.forward`.

    feature_dropout zeroes that share of the channels of each training image's vision_states, others for each step, and scales
    the rest up.
    """

    def __init__(self, special: SpecialTokens, *, padding: str = "batch", feature_dropout: float = 0.0):
        limits.real("feature_dropout", feature_dropout, 0, 1, open_ends="most")
        self.pad, self.padding, self.feature_dropout = special.end_of_text, padding, feature_dropout
        self.answer_size = 0
        name, _, number = padding.partition(":")
        if name == "fixed" and number.isdigit() and int(number) > 0:
            self.answer_size = int(number)
        elif padding not in ("batch", "none"):
            raise ValueError(f"unknown padding {padding!r}: use 'batch', 'none' or 'fixed:N'")

    def width(self, items: Sequence[dict]) -> int:
        """T of a batch of these items."""
        return max(len(self._answer_padded(item)[0]) for item in items)

    def __call__(self, items: Sequence[dict], *, width: int | None = None) -> dict[str, torch.Tensor]:
        """input_ids, labels, attention_mask [B, T] int64, t [B], u [B, T], and where there are images pixel_values
        [views, 3, H, W] (or vision_states [views, N, D_vision]) and, unless merged flat, image_layouts [n, 7]. T is `width`, by
        default that of the longest item.
        """
        rows = [self._answer_padded(item) for item in items]
        width = width or self.width(items)
        visible = self.padding == "batch"
        label = self.pad if visible else IGNORED
        noise = []  # from each sample's own seeds; a longer row only adds draws at its end
        for item in items:
            seed, step, index = item["noise"]
            noise.append(draw_noise(seed, step, [index], width, strata=[item["stratum"]]))
        batch = {
            "input_ids": torch.tensor([ids + [self.pad] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [label] * (width - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [int(visible)] * (width - len(ids)) for ids, _ in rows]),
            "t": torch.cat([t for t, _ in noise]),
            "u": torch.cat([u for _, u in noise]),
        }
        return batch | joined([self._thinned(item) for item in items] if self.feature_dropout else items)

    def _thinned(self, item: dict) -> dict:
        """A training item without some channels of its image, drawn from the item's own seeds."""
        seed, step, index = item["noise"]
        if step < 0 or not {"vision_states", "pixel_values"} & set(item):
            return item
        if "vision_states" not in item:
            raise ValueError("feature_dropout needs the tower's states: take Profile.with_recipe(stage, cached_vision=True)")
        states = item["vision_states"]  # [views, N, D_vision]
        generator = noise_generator(~seed, step, index)  # other draws than the text's
        kept = torch.rand(states.shape[-1], generator=generator) >= self.feature_dropout
        return item | {"vision_states": states * kept.to(states) / (1 - self.feature_dropout)}

    def _answer_padded(self, item: dict) -> tuple[list[int], list[int]]:
        extra = [self.pad] * max(0, self.answer_size - item["answer_length"])
        return item["input_ids"] + extra, item["labels"] + extra
