"""From examples to batches: ids, labels, padding and the noise of each sample.

Padding policies (the question most asked of masked diffusion training, as it decides whether a model learns where to end):
"batch"    pad with end-of-text to the longest of the batch; pads are visible, hidden and scored (the reference; the loss of
           a sample then depends on its companions). In training the batch is the global one, however it is cut.
"fixed:N"  pad the last answer with end-of-text to N tokens, visible and scored, whatever the batch is; further padding is
           invisible.
"none"     padding is invisible and never scored.
"""

from collections.abc import Sequence

import torch

from medv.data.chat import IGNORED, LOSS_TOKENS, SpecialTokens, encode_dialogue, encode_plain, turn_numbers
from medv.data.example import Example
from medv.diffusion.corruption import draw_noise, noise_generator
from medv.model.looks import Looks, joined
from medv.model.processing import MedVProcessor

ENCODINGS = (*LOSS_TOKENS, "plain")


class Encoder:
    """Example -> {"input_ids", "labels", "answer_length", "turns"} and, with an image, the tensors of `looks` (by default new
    ones, see `Looks`).

    loss_tokens is one of ENCODINGS: "official" or "response" (see `encode_dialogue`), or "plain" (`encode_plain`, the
    alignment stage of the reference: image, last answer, newline).
    """

    def __init__(self, processor: MedVProcessor, *, loss_tokens: str, max_length: int, looks: Looks | None = None):
        if loss_tokens not in ENCODINGS:
            raise ValueError(f"unknown loss_tokens {loss_tokens!r}: use one of {', '.join(ENCODINGS)}")
        self.processor, self.loss_tokens, self.max_length = processor, loss_tokens, max_length
        self.looks = looks or Looks(processor)

    def __call__(self, example: Example) -> dict:
        """Encode one example; raises ValueError naming it where it is longer than `max_length`."""
        processor = self.processor
        image_tokens, tensors = self.looks(example)
        if self.loss_tokens == "plain":
            encoded = encode_plain(processor.tokenizer, example.answer, image_tokens=image_tokens)
        else:
            encoded = encode_dialogue(
                processor.tokenizer,
                example.turns,
                system=processor.system_prompt,
                image_tokens=image_tokens,
                loss_tokens=self.loss_tokens,
            )
        if len(encoded.ids) > self.max_length:
            raise ValueError(
                f"example {example.id} has {len(encoded.ids)} tokens, more than the maximum of {self.max_length}: "
                "shorten it or raise max_length in the recipe"
            )
        return {
            "input_ids": encoded.ids,
            "labels": encoded.labels,
            "answer_length": encoded.answer_length,
            "turns": turn_numbers(encoded.ids, processor.tokenizer),
            **tensors,
        }


def conversation_mask(turns: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """bool [B, 1, T, T], True where a query (third dimension) sees a key: of its own turn or of an earlier one.

    turns [B, T] int64 are the numbers of `medv.data.chat.turn_numbers`; keys that attention_mask [B, T] hides are hidden.
    """
    seen = turns[:, :, None] >= turns[:, None, :]  # [B, T, T]
    if attention_mask is not None:
        seen &= attention_mask[:, None, :].bool()
    return seen[:, None]


class Collator:
    """A list of stream items -> the keyword arguments of `MedVForMaskedDiffusion.forward`.

    masked_turns=True hides later turns from earlier ones (the reference's conversation mask, which its recipes leave off;
    there it works for single examples only): attention_mask is then bool [B, 1, T, T]. feature_dropout zeroes that share of the
    channels of each training image's vision_states, others for each step, and scales the rest up.
    """

    def __init__(
        self, special: SpecialTokens, *, padding: str = "batch", masked_turns: bool = False, feature_dropout: float = 0.0
    ):
        if not 0 <= feature_dropout < 1:
            raise ValueError(f"feature_dropout {feature_dropout} is no share: give a number from 0 to below 1")
        self.pad = special.end_of_text
        self.padding = padding
        self.masked_turns, self.feature_dropout = masked_turns, feature_dropout
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
        t, u = self._noise(items, width)
        batch = {
            "input_ids": torch.tensor([ids + [self.pad] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [label] * (width - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [int(visible)] * (width - len(ids)) for ids, _ in rows]),
            "t": t,
            "u": u,
        }
        if self.masked_turns:
            turns = [item["turns"] + item["turns"][-1:] * (width - len(item["turns"])) for item in items]
            batch["attention_mask"] = conversation_mask(torch.tensor(turns), batch["attention_mask"])
        batch |= joined([self._thinned(item) for item in items] if self.feature_dropout else items)
        return batch

    def _thinned(self, item: dict) -> dict:
        """A training item without some channels of its image, drawn from the item's own seeds."""
        seed, step, index = item["noise"]
        if step < 0 or not {"vision_states", "pixel_values"} & set(item):
            return item
        if "vision_states" not in item:
            raise ValueError("feature_dropout needs the tower's states: set cached_vision=True in the recipe")
        states = item["vision_states"]  # [views, N, D_vision]
        generator = noise_generator(~seed, step, index)  # other draws than the text's
        kept = torch.rand(states.shape[-1], generator=generator) >= self.feature_dropout
        return item | {"vision_states": states * kept.to(states) / (1 - self.feature_dropout)}

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
