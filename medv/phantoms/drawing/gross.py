"""Gross pathology: a cut organ on a board with a ruler and a tag, fresh or fixed in formalin; sides are the image's."""

import numpy as np

from medv.phantoms.drawing.canvas import Canvas, over, place
from medv.phantoms.scene import NORMAL, Scene

_BOARDS = ((0.16, 0.34, 0.62), (0.12, 0.42, 0.34), (0.10, 0.10, 0.12), (0.22, 0.46, 0.66))


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One photograph as RGB values, [size, size, 3]."""
    fresh = scene.acquisition == "fresh"
    image = _board(canvas)
    center = canvas.uniform(0.48, 0.52), canvas.uniform(0.45, 0.48)
    slab = canvas.ellipse(*center, canvas.uniform(0.39, 0.43), canvas.uniform(0.335, 0.37), canvas.uniform(-0.2, 0.2))
    bend = canvas.uniform(-0.35, 0.35)
    belly = np.clip((canvas.y - center[1]) * 8.0, -1, 1)
    slab = slab + 0.6 * bend * (canvas.x - center[0]) ** 2 * belly + 0.016 * canvas.noise(4)
    image = image * (1 - 0.45 * canvas.cover(slab - 0.012, 0.06)[..., None])
    tissue = _cut_surface(canvas, slab, fresh)
    if fresh:
        shine = np.clip((canvas.fractal(17, 2) - 2.0) * 1.5, 0, 1)
        tissue = over(tissue, (1.0, 0.95, 0.93), 0.7 * shine)
    if scene.finding != NORMAL:
        dx, dy = ((0.17, 0.20), (0.14, 0.16)) if scene.size == "large" else ((0.14, 0.21), (0.13, 0.17))
        lesion = place(scene, canvas, center=center, dx=dx, dy=dy, small=(0.08, 0.09), large=(0.145, 0.165))
        tissue = _FINDINGS[scene.finding](canvas, lesion, tissue)
    light = 1.0 + 0.10 * (0.5 - canvas.y) + 0.06 * (0.5 - canvas.x) - 0.35 * np.exp(np.minimum(slab, 0) / 0.022)
    image = over(image, tissue * light[..., None], canvas.cover(slab, 0.01))
    return image * canvas.uniform(0.92, 1.06) + 0.012 * canvas.grain(3)


def _board(canvas):
    """The board, with a ruler along its lower edge and a paper tag in a corner."""
    color = np.array(_BOARDS[int(canvas.rng.integers(len(_BOARDS)))], np.float32)
    image = color * (1.0 + 0.04 * canvas.fractal(4, 2)[..., None]) * (1.05 - 0.15 * canvas.y[..., None])
    top, left = canvas.uniform(0.905, 0.93), canvas.uniform(0.05, 0.3)
    ruler = np.maximum(np.abs(canvas.x - left - 0.3) - 0.3, np.abs(canvas.y - top - 0.028) - 0.028)
    image = over(image, (0.92, 0.91, 0.86), canvas.cover(ruler))
    tick = np.abs((canvas.x - left) % 0.06 - 0.03) - 0.006
    ticks = np.maximum(np.maximum(tick, ruler), np.abs(canvas.y - top - 0.012) - 0.013)
    image = over(image, (0.1, 0.1, 0.1), canvas.cover(ticks))
    if canvas.uniform(0, 1) < 0.5:
        x, y = (0.09, 0.91)[int(canvas.rng.integers(2))], canvas.uniform(0.05, 0.08)
        tag = np.maximum(np.abs(canvas.x - x) - 0.075, np.abs(canvas.y - y) - 0.04)
        image = over(image, (0.93, 0.93, 0.90), canvas.cover(tag))
        line = np.maximum(np.abs(canvas.x - x) - 0.055, np.abs((canvas.y - y + 0.02) % 0.02 - 0.01) - 0.003)
        image = over(image, (0.25, 0.25, 0.3), 0.8 * canvas.cover(np.maximum(line, np.abs(canvas.y - y) - 0.03)))
    return image


def _cut_surface(canvas, slab, fresh):
    """Tissue with a capsule, a mottled parenchyma and small vessels."""
    red, green, blue = ((0.46, 0.62), (0.15, 0.22), (0.13, 0.18)) if fresh else ((0.60, 0.70), (0.53, 0.61), (0.45, 0.52))
    color = np.array([canvas.uniform(*red), canvas.uniform(*green), canvas.uniform(*blue)], np.float32)
    mottle = canvas.fractal(7, 3)[..., None]
    tissue = color * (1.0 + 0.055 * mottle)
    cortex = canvas.cover(slab + canvas.uniform(0.04, 0.07) + 0.01 * canvas.noise(9), 0.03)
    tissue = over(tissue * 0.90, tissue * 1.07, cortex)
    vessels = np.exp(-(canvas.noise(7) ** 2) * 9) * np.clip(canvas.noise(5), 0, 1)
    tissue = over(tissue, color * 0.74, 0.5 * vessels)
    capsule = canvas.cover(np.abs(slab + 0.012) - 0.008, 0.012)
    return over(tissue, color * 0.55 + 0.40, 0.6 * capsule)


def _outline(canvas, lesion, ragged):
    rng = canvas.lesion_rng
    round_ = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * rng.uniform(0.85, 1.0), rng.uniform(-1, 1))
    return round_ + ragged * canvas.noise(9, rng)


def _relief(canvas, lesion, distance):
    """Brightness of a dome lit from the upper left."""
    toward = (lesion.x - canvas.x) + (lesion.y - canvas.y)
    return 1.0 + 0.13 * np.clip(toward / lesion.radius, -1.4, 1.4) * canvas.cover(distance)


def _tumor(canvas, lesion, tissue):
    """A white-tan bulging nodule."""
    distance = _outline(canvas, lesion, 0.014)
    color = np.array([0.91, 0.86, 0.76], np.float32) * (1 + 0.05 * canvas.fractal(10, 2, canvas.lesion_rng)[..., None])
    tissue = tissue * (1 - 0.35 * canvas.cover(distance - 0.015, 0.03)[..., None])
    return over(tissue, color * _relief(canvas, lesion, distance)[..., None], canvas.cover(distance, 0.012))


def _hemorrhage(canvas, lesion, tissue):
    """A dark red blotch with ragged, seeping edges."""
    distance = _outline(canvas, lesion, 0.016)
    tissue = over(tissue, (0.42, 0.05, 0.06), 0.55 * canvas.cover(distance - 0.02, 0.04))
    return over(tissue, (0.20, 0.015, 0.03), 0.96 * canvas.cover(distance, 0.03))


def _cyst(canvas, lesion, tissue):
    """A translucent gray-blue cavity within a pale rim."""
    distance = _outline(canvas, lesion, 0.006)
    fluid = np.array([0.42, 0.51, 0.60], np.float32) * (2.0 - _relief(canvas, lesion, distance))[..., None]
    tissue = over(tissue, (0.84, 0.78, 0.73), canvas.cover(distance - 0.010, 0.014))
    tissue = over(tissue, 0.88 * fluid + 0.12 * tissue, canvas.cover(distance + 0.008, 0.02))
    deep = canvas.cover(distance + 0.45 * lesion.radius, 0.7 * lesion.radius)
    tissue = over(tissue, (0.30, 0.40, 0.52), 0.45 * deep)
    glint = canvas.ellipse(
        lesion.x - 0.38 * lesion.radius, lesion.y - 0.38 * lesion.radius, 0.16 * lesion.radius, 0.10 * lesion.radius, -0.7
    )
    return over(tissue, (0.92, 0.96, 1.0), 0.7 * canvas.cover(glint, 0.015))


def _ulcer(canvas, lesion, tissue):
    """A crater: yellow sloughy base, raised red rim."""
    rng = canvas.lesion_rng
    distance = _outline(canvas, lesion, 0.010)
    rim = np.array([0.66, 0.13, 0.11], np.float32) * (1 + 0.10 * canvas.noise(14, rng)[..., None])
    tissue = over(tissue, rim * _relief(canvas, lesion, distance)[..., None], canvas.cover(distance - 0.008, 0.02))
    floor = distance + 0.26 * lesion.radius + 0.006 * canvas.noise(16, rng)
    base = np.array([0.84, 0.70, 0.33], np.float32) * (1 + 0.10 * canvas.noise(18, rng)[..., None])
    base = over(base, (0.45, 0.22, 0.10), 0.5 * np.clip(canvas.noise(13, rng) - 0.6, 0, 1))
    shade = 2.0 - _relief(canvas, lesion, distance)
    return over(tissue, base * shade[..., None], canvas.cover(floor, 0.022))


_FINDINGS = {"tumor": _tumor, "hemorrhage": _hemorrhage, "cyst": _cyst, "ulcer": _ulcer}
