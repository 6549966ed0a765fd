"""From examples to batches: ids, labels, padding and the noise of each sample.

Padding policies (the question most asked of masked diffusion training, as it decides whether a model learns where to end):
"batch"    pad with end-of-text to the longest of the batch; pads are visible, hidden and scored (the reference; the loss of
           a sample then depends on its companions).
"fixed:N"  pad the last answer with end-of-text to N tokens, visible and scored, whatever the batch is; further padding is
           invisible.
"none"     padding is invisible and never scored.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from medv.data.chat import IGNORED, SpecialTokens, encode_dialogue
from medv.data.example import Example, load_image
from medv.diffusion.corruption import draw_noise
from medv.model.processing import MedVProcessor


class Encoder:
    """Example -> {"input_ids", "labels", "answer_length", "pixel_values"}; pixels are kept in memory once computed."""

    def __init__(self, processor: MedVProcessor, *, loss_tokens: str, max_length: int):
        self.processor, self.loss_tokens, self.max_length = processor, loss_tokens, max_length
        self._pixels: dict[Path | Callable[[], Image.Image], torch.Tensor] = {}

    def __call__(self, example: Example) -> dict:
        """Encode one example; raises ValueError naming it where it is longer than `max_length`."""
        processor = self.processor
        encoded = encode_dialogue(
            processor.tokenizer,
            example.turns,
            system=processor.system_prompt,
            image_tokens=0 if example.image is None else processor.image_tokens,
            loss_tokens=self.loss_tokens,
        )
        if len(encoded.ids) > self.max_length:
            raise ValueError(
                f"example {example.id} has {len(encoded.ids)} tokens, more than the maximum of {self.max_length}: "
                "shorten it or raise max_length in the recipe"
            )
        item = {"input_ids": encoded.ids, "labels": encoded.labels, "answer_length": encoded.answer_length}
        if example.image is not None:
            item["pixel_values"] = self._pixels_of(example)
        return item

    def _pixels_of(self, example: Example) -> torch.Tensor:
        if example.image not in self._pixels:
            self._pixels[example.image] = self.processor.pixels([load_image(example)])[0]  # [3, H, W]
        return self._pixels[example.image]


class Collator:
    """A list of stream items -> the keyword arguments of `MedVForMaskedDiffusion.forward`."""

    def __init__(self, special: SpecialTokens, *, padding: str = "batch"):
        self.pad = special.end_of_text
        self.padding = padding
        self.answer_size = 0
        name, _, number = padding.partition(":")
        if name == "fixed" and number.isdigit() and int(number) > 0:
            self.answer_size = int(number)
        elif padding not in ("batch", "none"):
            raise ValueError(f"unknown padding {padding!r}: use 'batch', 'none' or 'fixed:N'")

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """input_ids, labels, attention_mask [B, T] int64, t [B], u [B, T], and pixel_values [n, 3, H, W] where there are."""
        rows = [self._answer_padded(item) for item in items]
        width = max(len(ids) for ids, _ in rows)
        visible = self.padding == "batch"
        label = self.pad if visible else IGNORED
        t, u = self._noise(items, width)
        batch = {
            "input_ids": torch.tensor([ids + [self.pad] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [label] * (width - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [int(visible)] * (width - len(ids)) for ids, _ in rows]),
            "t": t,
            "u": u,
        }
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)  # [n, 3, H, W]
        return batch

    def _answer_padded(self, item: dict) -> tuple[list[int], list[int]]:
        extra = [self.pad] * max(0, self.answer_size - item["answer_length"])
        return item["input_ids"] + extra, item["labels"] + extra

    @staticmethod
    def _noise(items: Sequence[dict], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of each sample from its own seeds; a longer row only adds draws at its end."""
        drawn = [
            draw_noise(seed, step, [index], width, strata=[item["stratum"]])
            for item in items
            for seed, step, index in [item["noise"]]
        ]
        return torch.cat([t for t, _ in drawn]), torch.cat([u for _, u in drawn])  # [B], [B, T]
