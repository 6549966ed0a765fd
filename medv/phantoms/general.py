"""The general domain: colored shapes to count, in place of the everyday images of LLaDA-V's training.

The initialization ablation (Table 4) starts from a model trained on these alone.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (220, 45, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (240, 130, 30),
}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
BACKGROUNDS = {"white": (240, 240, 236), "gray": (140, 142, 145), "black": (22, 22, 26)}


@dataclass(frozen=True)
class ShapeScene:
    """`count` copies of one shape in one color on a plain background."""

    seed: int
    shape: str
    color: str
    count: int
    background: str

    def facts(self) -> frozenset[tuple[str, str]]:
        """The (attribute, value) pairs that a full description states, the count as a word."""
        values = {"shape": self.shape, "color": self.color, "count": COUNTS[self.count], "background": self.background}
        return frozenset(values.items())


def sample_shapes(seed: int, **wanted: str | int) -> ShapeScene:
    """Draw a scene of shapes from its seed, every attribute uniform; `wanted` fixes shape, color, count or background."""
    values = {"shape": SHAPES, "color": tuple(COLORS), "count": tuple(COUNTS), "background": tuple(BACKGROUNDS)}
    for name, value in wanted.items():
        if name not in values:
            raise ValueError(f"a scene of shapes has no attribute {name}: use one of {', '.join(values)}")
        if value not in values[name]:
            raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(map(str, values[name]))}")
    rng = np.random.default_rng([seed, 0x5A4E])
    drawn = {name: options[int(rng.integers(len(options)))] for name, options in values.items()}
    return ShapeScene(seed=seed, **(drawn | wanted))


def draw_shapes(scene: ShapeScene, size: int = 64) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]."""
    rng = np.random.default_rng([scene.seed, 0xD4A3])
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    image = np.array(BACKGROUNDS[scene.background], np.float32) * rng.uniform(0.96, 1.04)
    image = image + 10.0 * (y - 0.5)[..., None] + np.zeros((size, size, 1), np.float32)
    paint = np.array(COLORS[scene.color], np.float32) * rng.uniform(0.88, 1.05)
    # One shape per quadrant at most, so that shapes never touch and can be counted.
    for quadrant in rng.permutation(4)[: scene.count]:
        cx = 0.25 + 0.5 * (quadrant % 2) + rng.uniform(-0.06, 0.06)
        cy = 0.25 + 0.5 * (quadrant // 2) + rng.uniform(-0.06, 0.06)
        radius, turn = rng.uniform(0.12, 0.175), rng.uniform(-0.3, 0.3)
        u, v = x - cx, y - cy
        u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        opacity = np.clip(0.5 - _distance(scene.shape, u / radius, v / radius) * radius * size, 0, 1)
        image += opacity[..., None] * (paint * (1.05 - 0.1 * (v / radius))[..., None] - image)
    image += np.random.default_rng([scene.seed, size]).standard_normal(image.shape, dtype=np.float32) * 3.0
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def shapes_image(scene: ShapeScene, size: int = 64) -> Image.Image:
    """`draw_shapes` as a PIL image."""
    return Image.fromarray(draw_shapes(scene, size))


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline (negative inside) of a shape of about unit radius."""
    r = np.sqrt(u * u + v * v)
    if shape == "circle":
        return r - 0.95
    if shape == "ring":
        return np.abs(r - 0.75) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return np.maximum(narrow - 0.32, wide - 1.0)
    if shape == "triangle":
        return np.maximum(np.abs(u) * 0.866 - v * 0.5, v) - 0.52
    # A star: five spikes around the center.
    angle = (np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
    spike_u, spike_v = r * np.abs(np.sin(angle)), r * np.cos(angle)
    return spike_u * 0.85 + (spike_v - 1.08) * 0.42
