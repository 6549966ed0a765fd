"""Nuclei: one jittered cell in every square of a grid, drawn without a Python loop."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from medv.phantoms.drawing.canvas import Canvas


def nuclei(
    canvas: Canvas,
    cells: int,
    radius: float,
    *,
    rng: np.random.Generator,
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    density: float = 1.0,
    stretch: float = 0.3,
    spread: float = 0.35,
    soft: float = 0.0,
) -> np.ndarray:
    """Opacity [size, size] of nuclei of about `radius` on a grid of `cells` a side.

    density: the share of squares that hold one; keep(x, y): true where one may be; stretch: how elliptic they are;
    spread: the jitter in units of a square; soft: the width of their outline.
    """
    side = cells + 2
    jitter = rng.uniform(-spread, spread, (4, side * side)).astype(np.float32)
    column, row = np.meshgrid(np.arange(side) - 0.5, np.arange(side) - 0.5)
    x = (column.ravel() + jitter[0]) / cells
    y = (row.ravel() + jitter[1]) / cells
    present = rng.random(side * side) < density
    if keep is not None:
        present &= keep(x, y)
    if not present.any():
        return np.zeros((canvas.size, canvas.size), np.float32)
    r = radius * (1.0 + 0.7 * jitter[2])
    angle = jitter[3] * (np.pi / (2 * spread))
    longer = 1.0 + stretch * rng.random(side * side)
    cos, sin = np.cos(angle), np.sin(angle)
    # Points in units of the nucleus: (A d)^2 < 1 inside.
    table = np.stack([x, y, cos / (r * longer), sin / (r * longer), cos * longer / r, sin * longer / r]).astype(np.float32)
    table[0, ~present] = 9.0
    # The squared distance of every pixel to the nearest nucleus, in units of its radius; in place, for these arrays are large.
    near = _neighbors(canvas.size, cells)
    dx, dy, a, b, c, d = (np.take(values, near) for values in table)
    np.subtract(canvas.x, dx, out=dx)
    np.subtract(canvas.y, dy, out=dy)
    a *= dx
    b *= dy
    a += b
    a *= a
    c *= dy
    d *= dx
    c -= d
    c *= c
    a += c
    return canvas.cover((np.sqrt(a.min(axis=0)) - 1.0) * radius, soft)


@lru_cache(maxsize=32)
def _neighbors(size: int, cells: int) -> np.ndarray:
    """For every pixel the 9 squares around it, as indices into a grid with one square of margin: [9, size, size]."""
    square = np.floor((np.arange(size) + 0.5) / size * cells).astype(np.intp) + 1
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    near = np.stack([(square + i)[:, None] * (cells + 2) + (square + j)[None, :] for i, j in steps])
    near.setflags(write=False)
    return near
