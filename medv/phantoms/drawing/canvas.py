"""Drawing tools of all phantoms: a unit square of pixels, three random streams, smooth noise and soft shapes.

Coordinates are of the unit square (x to the right, y down), so that a scene shows the same anatomy at every size. Shapes are
signed distances (negative inside, in units of the image side) that `cover` turns into an opacity. Anatomy, lesion and grain
have separate random streams: a scene and the same scene without its finding share all the rest.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medv.phantoms.scene import SIDES, Scene

RADIOLOGICAL = ("chest_xray", "ct", "mri")  # the patient's left is on the right of the image


class Canvas:
    """Pixel coordinates `x`, `y` (float32 [size, size], pixel centers) and the random streams of one scene."""

    def __init__(self, scene: Scene, size: int):
        if size < 8:
            raise ValueError(f"an image of {size} pixels is too small for a phantom: use 8 or more")
        self.size = size
        self.pixel = 1.0 / size
        self.x, self.y = _coordinates(size)
        self.rng, self.lesion_rng, self.grain_rng = (
            np.random.default_rng([scene.seed, stream, len(scene.domain)]) for stream in (1, 2, 3)
        )

    def uniform(self, low: float, high: float) -> float:
        """One random number of the anatomy."""
        return float(self.rng.uniform(low, high))

    def noise(self, cells: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Smooth noise of about unit deviation, [size, size]: a cubic B-spline over `cells` random cells a side."""
        grid = (rng or self.rng).standard_normal((cells + 3, cells + 3), dtype=np.float32)
        weights = _spline(self.size, cells)
        return weights @ grid @ weights.T

    def fractal(self, cells: int, octaves: int = 3, rng: np.random.Generator | None = None) -> np.ndarray:
        """A sum of noises, each twice as fine and half as strong as the one before, [size, size]."""
        total = self.noise(cells, rng)
        for octave in range(1, octaves):
            total += self.noise(cells << octave, rng) * 0.5**octave
        return total

    def grain(self, channels: int = 0) -> np.ndarray:
        """Independent noise of every pixel, [size, size] or [size, size, channels]."""
        shape = (self.size, self.size, channels) if channels else (self.size, self.size)
        return self.grain_rng.standard_normal(shape, dtype=np.float32)

    def cover(self, distance: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """Opacity 0..1 of a shape: 1 inside, falling over `soft` (at least one pixel) across its outline."""
        return np.clip(0.5 - distance / max(soft, self.pixel), 0.0, 1.0)

    def ellipse(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
        """Signed distance (exact for circles) to an ellipse turned clockwise by `angle` radians."""
        return ellipse(self.x, self.y, x, y, rx, ry, angle)

    def segment(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        """Distance to a straight segment."""
        dx, dy = x1 - x0, y1 - y0
        px, py = self.x - x0, self.y - y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0.0, 1.0)
        return np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)


def ellipse(px: np.ndarray, py: np.ndarray, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """`Canvas.ellipse` at given points, for shifted or warped coordinates."""
    dx, dy = px - x, py - y
    if angle:
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return (np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2) - 1.0) * min(rx, ry)


def over(image: np.ndarray, value: float | np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """`image` with `value` painted over it; opacity [size, size] serves gray and color images alike."""
    if image.ndim == 3:
        opacity = opacity[..., None]
    return image + opacity * (np.asarray(value, np.float32) - image)


@dataclass(frozen=True)
class Lesion:
    """The place of a finding: center, radius (unit coordinates) and the directions of its side and level in the image.

    `sx` is -1 on the left of the image and +1 on its right; `sy` is -1 in the upper (anterior) half and +1 in the lower.
    """

    x: float
    y: float
    radius: float
    sx: int
    sy: int
    large: bool


def place(
    scene: Scene,
    canvas: Canvas,
    *,
    center: tuple[float, float],
    dx: tuple[float, float],
    dy: tuple[float, float],
    small: tuple[float, float] = (0.07, 0.09),
    large: tuple[float, float] = (0.15, 0.18),
) -> Lesion:
    """Draw a lesion's place: offsets from `center` within dx and dy, away from the midlines; radius by the size."""
    sx = 1 if (scene.side == SIDES[0]) == (scene.domain in RADIOLOGICAL) else -1
    sy = -1 if scene.level in ("upper", "anterior") else 1
    rng, is_large = canvas.lesion_rng, scene.size == "large"
    x, y = center[0] + sx * rng.uniform(*dx), center[1] + sy * rng.uniform(*dy)
    return Lesion(float(x), float(y), float(rng.uniform(*(large if is_large else small))), sx, sy, is_large)


@lru_cache(maxsize=8)
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    grids = tuple(np.ascontiguousarray(grid) for grid in np.meshgrid(axis, axis))
    for grid in grids:
        grid.setflags(write=False)
    return grids


@lru_cache(maxsize=128)
def _spline(size: int, cells: int) -> np.ndarray:
    """Cubic B-spline weights [size, cells + 3], scaled so that the noise has about unit deviation in two dimensions."""
    at = (np.arange(size) + 0.5) / size * cells
    first = np.floor(at).astype(int)
    f = at - first
    pieces = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    weights = np.zeros((size, cells + 3), np.float32)
    for step, piece in enumerate(pieces):
        weights[np.arange(size), first + step] = piece / 6
    weights *= 1.44
    weights.setflags(write=False)
    return weights
