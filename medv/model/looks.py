"""The image tensors of examples, computed once per image: pixels, or the states of the frozen vision tower.

Training and evaluation share it, so that an image with many questions is read, prepared and encoded once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from medv.data.example import Example, load_image
from medv.data.images import ImageError
from medv.model.modeling import MedVModel
from medv.model.processing import MedVProcessor

KEPT_BYTES = 2 << 30
STATES_BYTES = 8 << 30
Look = tuple[int, dict[str, torch.Tensor]]


class Looks:
    """`looks(example)` -> the number of visual tokens of its image, and the image's inputs of the model.

    The tensors are pixel_values, [3, H, W] or [views, 3, H, W] of an image in tiles, and image_layouts [1, 7] unless
    patch_merge is "flat"; (0, {}) without an image. Up to `keep` bytes of pixels are cached. After `once` there are
    vision_states [views, N, D_vision] of one vision tower instead of pixel_values.
    """

    def __init__(self, processor: MedVProcessor, *, keep: int = KEPT_BYTES):
        self.processor = processor
        self._kept: dict[Path | Callable[[], Image.Image], Look] = {}
        self._free = keep

    def __call__(self, example: Example) -> Look:
        """Tokens and tensors of one image; raises ImageError where it cannot be read."""
        if example.image is None:
            return 0, {}
        if example.image in self._kept:
            return self._kept[example.image]
        try:
            image = load_image(example)
        except ImageError as error:
            raise ImageError(f"example {example.id}: {error}; mend it, or leave such out with --skip-corrupt") from error
        pixels, layouts = self.processor.pixels([image]).squeeze(0), self.processor.layouts([image])
        tensors = {"pixel_values": pixels} | ({} if layouts is None else {"image_layouts": layouts})
        look = self.processor.view_plan.tokens(*image.size), tensors
        if pixels.nbytes <= self._free:
            self._free -= pixels.nbytes
            self._kept[example.image] = look
        return look

    def readable(self, examples: Iterable[Example], *, skip_corrupt: bool) -> Iterator[tuple[Example, Look]]:
        """Each example and its look, one by one, with `skip_corrupt` without those whose image cannot be read."""
        for example in examples:
            try:
                yield example, self(example)
            except ImageError:
                if not skip_corrupt:
                    raise

    @torch.no_grad()
    def once(
        self,
        model: MedVModel,
        examples: Iterable[Example],
        *,
        device: torch.device | None = None,
        rows: int = 32,
        limit: int = STATES_BYTES,
        skip_corrupt: bool = False,
        quiet: bool = True,
    ) -> None:
        """Cache the vision states of every image of the examples that has none yet.

        The tower is on `device` meanwhile. Raises ValueError where the states of all images would exceed `limit` bytes.
        """
        shown = {example.image: example for example in examples if example.image is not None}
        shown = [e for image, e in shown.items() if "vision_states" not in self._kept.get(image, (0, {}))[1]]
        home, tower = model.vision_tower.device, model.vision_tower.to(device or model.vision_tower.device)
        for start in tqdm(range(0, len(shown), rows), desc="looking at images", disable=quiet):
            seen = list(self.readable(shown[start : start + rows], skip_corrupt=skip_corrupt))
            views = [look["pixel_values"].reshape(-1, *look["pixel_values"].shape[-3:]) for _, (_, look) in seen]
            if not views:
                continue
            states = model.look(torch.cat(views).to(tower.device)).cpu().split([len(view) for view in views])
            if (needed := states[0].nbytes * len(shown)) > limit:
                raise ValueError(
                    f"the vision states of {len(shown)} images take about {needed / 1e9:.1f} GB, more than the "
                    f"{limit / 1e9:.1f} GB kept in memory: take Profile.with_recipe(stage, cached_vision=False)"
                )
            for (example, (tokens, tensors)), state in zip(seen, states, strict=True):
                layouts = {name: value for name, value in tensors.items() if name != "pixel_values"}
                self._kept[example.image] = tokens, {"vision_states": state.clone()} | layouts
        model.vision_tower.to(home)


def joined(items: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The image tensors of a batch: pixel_values [views, 3, H, W] or vision_states [views, N, D_vision], and image_layouts
    [n, 7], each where there are any. Raises ValueError where only some of the images have vision states.
    """
    batch = {}
    if any("vision_states" in item for item in items) and any("pixel_values" in item for item in items):
        raise ValueError("only some images of a batch were looked at: give Looks.once all of them")
    for name in ("pixel_values", "vision_states", "image_layouts"):
        parts = [item[name] for item in items if name in item]
        if parts and name == "pixel_values":
            parts = [views.reshape(-1, *views.shape[-3:]) for views in parts]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
