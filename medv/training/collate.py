"""From examples to batches: ids, labels, padding and the noise of each sample.

Padding policies (the question most asked of masked diffusion training, as it decides whether a model learns where to end):
"batch"    pad with end-of-text to the longest of the batch; pads are visible, hidden and scored (the reference; the loss of
           a sample then depends on its companions). In training the batch is the global one, however it is cut.
"fixed:N"  pad the last answer with end-of-text to N tokens, visible and scored, whatever the batch is; further padding is
           invisible.
"none"     padding is invisible and never scored.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from medv.data.chat import IGNORED, LOSS_TOKENS, SpecialTokens, encode_dialogue, encode_plain, turn_numbers
from medv.data.example import Example, load_image
from medv.diffusion.corruption import draw_noise
from medv.model.modeling import MedVModel
from medv.model.processing import MedVProcessor

KEPT_BYTES = 2 << 30
STATES_BYTES = 8 << 30
ENCODINGS = (*LOSS_TOKENS, "plain")


class Encoder:
    """Example -> {"input_ids", "labels", "answer_length", "turns"} and, with an image, {"pixel_values", "image_layouts"}.

    pixel_values are [3, H, W], or [views, 3, H, W] of an image in tiles; image_layouts [1, 7] are there unless views are
    merged flat. loss_tokens is one of ENCODINGS: "official" or "response" (see `encode_dialogue`), or "plain"
    (`encode_plain`, the alignment stage of the reference: image, last answer, newline). What was computed of images is kept
    in memory up to KEPT_BYTES. After `look_once` there are vision_states [views, N, D_vision] in the place of pixel_values.
    """

    def __init__(self, processor: MedVProcessor, *, loss_tokens: str, max_length: int):
        if loss_tokens not in ENCODINGS:
            raise ValueError(f"unknown loss_tokens {loss_tokens!r}: use one of {', '.join(ENCODINGS)}")
        self.processor, self.loss_tokens, self.max_length = processor, loss_tokens, max_length
        self._kept: dict[Path | Callable[[], Image.Image], tuple[int, dict[str, torch.Tensor]]] = {}
        self._free = KEPT_BYTES

    def __call__(self, example: Example) -> dict:
        """Encode one example; raises ValueError naming it where it is longer than `max_length`."""
        processor = self.processor
        image_tokens, tensors = (0, {}) if example.image is None else self._look(example)
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

    @torch.no_grad()
    def look_once(
        self,
        model: MedVModel,
        examples: Iterable[Example],
        *,
        device: torch.device | None = None,
        rows: int = 32,
        limit: int = STATES_BYTES,
        quiet: bool = True,
    ) -> None:
        """Keep what the frozen vision tower makes of every image of the examples, so that training never runs it.

        The tower goes to `device` meanwhile. Raises ValueError where the states of all images would not fit into `limit`.
        """
        shown = list({example.image: example for example in examples if example.image is not None}.values())
        home, tower = model.vision_tower.device, model.vision_tower.to(device or model.vision_tower.device)
        for start in tqdm(range(0, len(shown), rows), desc="looking at images", disable=quiet):
            looks = [self._look(example) for example in shown[start : start + rows]]
            views = [tensors["pixel_values"].reshape(-1, *tensors["pixel_values"].shape[-3:]) for _, tensors in looks]
            states = model.look(torch.cat(views).to(tower.device)).cpu().split([len(view) for view in views])
            if (needed := states[0].nbytes * len(shown)) > limit:
                raise ValueError(
                    f"the vision states of {len(shown)} images take about {needed / 1e9:.1f} GB, more than the "
                    f"{limit / 1e9:.1f} GB kept in memory: set cached_vision=False in the recipe"
                )
            for example, (tokens, tensors), state in zip(shown[start : start + rows], looks, states, strict=True):
                layouts = {name: value for name, value in tensors.items() if name != "pixel_values"}
                self._kept[example.image] = tokens, {"vision_states": state.clone()} | layouts
        model.vision_tower.to(home)

    def _look(self, example: Example) -> tuple[int, dict[str, torch.Tensor]]:
        """The number of visual tokens of an example's image, and the tensors that the model needs of it."""
        if example.image in self._kept:
            return self._kept[example.image]
        image = load_image(example)
        tensors = {"pixel_values": self.processor.pixels([image]).squeeze(0)}
        layouts = self.processor.layouts([image])
        if layouts is not None:
            tensors["image_layouts"] = layouts  # [1, 7]
        look = self.processor.view_plan.tokens(*image.size), tensors
        if tensors["pixel_values"].nbytes <= self._free:
            self._free -= tensors["pixel_values"].nbytes
            self._kept[example.image] = look
        return look


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
    there it works for single examples only): attention_mask is then bool [B, 1, T, T].
    """

    def __init__(self, special: SpecialTokens, *, padding: str = "batch", masked_turns: bool = False):
        self.pad = special.end_of_text
        self.padding = padding
        self.masked_turns = masked_turns
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
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            batch["pixel_values"] = torch.cat([views.reshape(-1, *views.shape[-3:]) for views in pixels])
        states = [item["vision_states"] for item in items if "vision_states" in item]
        if states:
            batch["vision_states"] = torch.cat(states)
        layouts = [item["image_layouts"] for item in items if "image_layouts" in item]
        if layouts:
            batch["image_layouts"] = torch.cat(layouts)
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
