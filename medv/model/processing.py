"""From images and questions to tensors: `MedVProcessor`, the image processor and LLaDA's chat format in one object.

It cuts the image into views (`medv.model.views`), renders the prompt with one placeholder per visual token and pads prompts
on the left.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medv.data.chat import SYSTEM_PROMPTS, SpecialTokens, encode_prompt
from medv.data.example import Turn
from medv.data.images import as_picture
from medv.model.configuration import MedVConfig
from medv.model.views import ViewPlan


class MedVProcessor(ProcessorMixin):
    """`processor(images=..., text=..., return_tensors="pt")` returns the inputs of `MedVForMaskedDiffusion.generate`.

    image_processor: resizes to the tower's square size (bicubic) and normalizes. tokenizer: a fast tokenizer with LLaDA's
    special tokens and `<image>`. image_tokens: visual tokens of one view. system: "medical", "general", any other text, or
    None for no system message (the tiny models are trained without). image_aspect, image_grid, image_max_tiles and
    patch_merge: how an image becomes views and tokens, see `medv.model.views`; like `system` they are saved with the
    processor and may be given to `from_pretrained` or set later. official_prompts: write prompts as the reference's
    demonstration does, without the newline after the image that its training has (released models).
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_tokens: int = 729,
        system: str | None = "medical",
        chat_template: str | None = None,
        image_aspect: str = "square",
        image_grid: Sequence[Sequence[int]] = (),
        image_max_tiles: int | None = None,
        patch_merge: str = "flat",
        official_prompts: bool = False,
    ):
        self.image_tokens = image_tokens
        self.image_aspect, self.image_max_tiles, self.patch_merge = image_aspect, image_max_tiles, patch_merge
        self.image_grid = [list(pair) for pair in image_grid]
        self.system = system
        self.official_prompts = official_prompts
        self.special = SpecialTokens.of(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        _ = self.view_plan  # raises for settings that do not fit together

    @property
    def view_plan(self) -> ViewPlan:
        """How pictures become views and visual tokens, from the current settings."""
        return ViewPlan.of(self, self.image_processor.size["height"], math.isqrt(self.image_tokens))

    @property
    def system_prompt(self) -> str | None:
        """The text of the system message, or None."""
        return SYSTEM_PROMPTS.get(self.system, self.system)

    @property
    def model_input_names(self) -> list[str]:
        """The tensors that `__call__` returns."""
        names = ["input_ids", "attention_mask", "pixel_values"]
        return names if self.patch_merge == "flat" else [*names, "image_layouts"]

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One prompt per question, with one image each (or none for all).

        Returns input_ids and attention_mask [B, P] int64, padded on the left, pixel_values float32 [V, 3, H, W] of all
        views of all images (V = B except for "anyres"), and, unless patch_merge is "flat", image_layouts int64 [B, 7], by
        which the model merges the views. Images are PIL images of any mode, converted as `open_image` converts files.
        Raises ValueError for an empty question, for images of another type and where images and questions differ in number.
        """
        questions = [text] if isinstance(text, str) else list(text or ())
        several = isinstance(images, Sequence) and not isinstance(images, str)
        pictures = None if images is None else [as_picture(image) for image in (images if several else [images])]
        if not questions or not all(question.strip() for question in questions):
            raise ValueError("the question is empty: ask something about the image")
        if pictures is not None and len(pictures) != len(questions):
            raise ValueError(f"{len(pictures)} images but {len(questions)} questions: give one image per question")
        prompts = []
        for question, picture in zip(questions, pictures or [None] * len(questions), strict=True):
            count = 0 if picture is None else self.view_plan.tokens(*picture.size)
            prompts.append(self.encode_turns((Turn("user", question.strip()),), image_tokens=count))
        return self.batch(prompts, pictures, return_tensors=return_tensors)

    def encode_turns(self, turns: tuple[Turn, ...], *, image_tokens: int = 0) -> list[int]:
        """Prompt ids of a dialogue that ends with a user turn, with `image_tokens` placeholders for an image."""
        how = {"system": self.system_prompt, "official": self.official_prompts}
        return encode_prompt(self.tokenizer, turns, image_tokens=image_tokens, **how)

    def batch(self, prompts: list[list[int]], images: list[Image.Image] | None, *, return_tensors: str = "pt") -> BatchFeature:
        """Pad prompts on the left and add the pixels."""
        width = max(len(prompt) for prompt in prompts)
        pad = self.special.end_of_text
        data = {
            "input_ids": [[pad] * (width - len(prompt)) + prompt for prompt in prompts],
            "attention_mask": [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        }
        if images is not None:
            data["pixel_values"] = self.pixels(images)
            layouts = self.layouts(images)
            if layouts is not None:
                data["image_layouts"] = layouts
        return BatchFeature(data, tensor_type=return_tensors)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """float32 [V, 3, H, W]: the views of all images, in order."""
        views = [view for image in images for view in self.view_plan.views(as_picture(image))]
        return self.image_processor(views, return_tensors="pt")["pixel_values"]

    def layouts(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """int64 [n, 7], the fields of `medv.model.views.Layout` of each image; None where views are not merged (flat)."""
        if self.patch_merge == "flat":
            return None
        return torch.tensor([astuple(self.view_plan.layout(*as_picture(image).size)) for image in images])

    def decode_response(self, ids, length: int | None = None) -> str:
        """The text of one row of `SamplerOutput.sequences`, without special tokens."""
        kept = list(ids)[: len(ids) if length is None else length]
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def image_processor(size: int, mean: Sequence[float], std: Sequence[float]) -> SiglipImageProcessorPil:
    """Squash to a square by bicubic interpolation and normalize each colour to (x / 255 - mean) / std (reference: [-1, 1])."""
    return SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std))


AutoProcessor.register(MedVConfig, MedVProcessor)
