"""Synthetic images (phantoms): a scene of medv.phantoms.scene as pixels, in five domains, drawn with numpy.

The same scene gives the same image on every machine and shows the same anatomy at every size; only grain is per pixel.
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from medv.phantoms.drawing import chest_xray, ct, gross, histology, mri
from medv.phantoms.drawing.canvas import Canvas
from medv.phantoms.scene import NORMAL, Scene, sample_scene, split_seed

_DRAW = {"chest_xray": chest_xray.draw, "ct": ct.draw, "mri": mri.draw, "histology": histology.draw, "gross": gross.draw}

VISIBLE = 16


def draw(scene: Scene, size: int = 64) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]; raises ValueError for an unknown domain or a size below 8."""
    if scene.domain not in _DRAW:
        raise ValueError(f"unknown domain {scene.domain!r}: use one of {', '.join(_DRAW)}")
    image = _DRAW[scene.domain](scene, Canvas(scene, size))
    pixels = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def lesion_mask(scene: Scene, size: int = 64) -> np.ndarray:
    """The pixels that the finding changes, bool [size, size]: those that differ by more than `VISIBLE` of 255 from the same
    scene drawn without it. A normal scene has none.
    """
    bare = replace(scene, finding=NORMAL, side=None, level=None, size=None)
    return np.abs(draw(scene, size).astype(int) - draw(bare, size)).max(axis=-1) > VISIBLE


def phantom_image(scene: Scene, size: int = 64) -> Image.Image:
    """`draw` as a PIL image; `functools.partial(phantom_image, scene, size)` pickles, so it serves as `Example.image`."""
    return Image.fromarray(draw(scene, size))


def phantom_scene(split: str, index: int, **wanted: str) -> Scene:
    """The scene of image `index` of a split ("train", "validation", "test"); `wanted` as in `sample_scene`."""
    return sample_scene(split_seed(split, index), **wanted)
