"""Histology in hematoxylin and eosin: pink stroma, purple nuclei, glands around pale lumina; sides are the image's."""

import numpy as np

from medv.phantoms.drawing.canvas import Canvas, Lesion, over, place
from medv.phantoms.drawing.cells import nuclei
from medv.phantoms.scene import NORMAL, Scene

_LUMEN = (0.95, 0.92, 0.95)


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One field of view as RGB values, [size, size, 3]."""
    high = scene.acquisition == "high power"
    eosin = np.array([canvas.uniform(0.88, 0.95), canvas.uniform(0.60, 0.70), canvas.uniform(0.78, 0.86)], np.float32)
    hematoxylin = np.array([canvas.uniform(0.36, 0.46), canvas.uniform(0.22, 0.32), canvas.uniform(0.55, 0.64)], np.float32)
    image = _stroma(canvas, eosin, high)
    lesion, clear = None, 1.0  # 0 where a lesion has replaced normal structures
    if scene.finding != NORMAL:
        offset = (0.20, 0.24) if scene.size == "large" else (0.17, 0.27)
        lesion = place(scene, canvas, center=(0.5, 0.5), dx=offset, dy=offset, small=(0.085, 0.10), large=(0.175, 0.20))
        clear = 1.0 - canvas.cover(canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius), 0.03)
    image = _glands(canvas, hematoxylin, image, high, clear)
    cells, radius = (7, 0.036) if high else (15, 0.0150)
    opacity = nuclei(canvas, cells, radius, rng=canvas.rng, density=0.5, stretch=0.5, soft=0.01)
    image = over(image, hematoxylin + 0.05 * canvas.noise(30)[..., None], 0.9 * opacity * clear)
    if lesion is not None:
        image = _FINDINGS[scene.finding](canvas, lesion, hematoxylin, image, high)
    return image * canvas.uniform(0.95, 1.03) + 0.015 * canvas.grain(3)


def _stroma(canvas, eosin, high):
    """Pink ground with fibers and fine clefts."""
    fibers = canvas.fractal(5 if high else 9, 3)
    image = eosin + fibers[..., None] * np.array([0.012, 0.035, 0.022], np.float32)
    clefts = np.exp(-(canvas.noise(6 if high else 11) ** 2) * 30) * np.clip(canvas.noise(5) + 0.2, 0, 1)
    return over(image, (0.97, 0.93, 0.96), 0.55 * clefts)


def _glands(canvas, hematoxylin, image, high, clear):
    """Round glands: a pale lumen, pink-purple epithelium and a ring of basal nuclei."""
    count = 2 if high else 5
    for _ in range(count):
        x, y = canvas.uniform(0.02, 0.98), canvas.uniform(0.02, 0.98)
        r = canvas.uniform(0.13, 0.17) if high else canvas.uniform(0.065, 0.09)
        nucleus, turn, flat = (0.023 if high else 0.0115), canvas.uniform(0, 6), canvas.uniform(0.75, 1.0)
        gland = canvas.ellipse(x, y, r, r * flat, turn)
        image = over(image, (0.84, 0.62, 0.80), 0.8 * canvas.cover(gland, 0.01) * clear)
        image = over(image, _LUMEN, canvas.cover(gland + 0.58 * r, 0.012) * clear)
        # Basal nuclei: the angle cut into equal arcs, one nucleus in the middle of each.
        arc = 2 * np.pi / int(2 * np.pi * r / (2.6 * nucleus))
        angle = np.arctan2(canvas.y - y, canvas.x - x)
        along = ((angle + turn) % arc - arc / 2) * (r - 1.4 * nucleus)
        beads = np.sqrt(along**2 + (0.75 * (gland + 1.5 * nucleus)) ** 2) - nucleus
        image = over(image, hematoxylin + 0.09, 0.9 * canvas.cover(beads, 0.01) * clear)
    return image


def _within(lesion: Lesion, rng: np.random.Generator, scale: float = 1.0):
    """Membership of points in the lesion's wavy disk."""
    phase = rng.uniform(0, 6)

    def keep(x, y):
        angle = np.arctan2(y - lesion.y, x - lesion.x)
        wavy = lesion.radius * scale * (1.0 + 0.12 * np.sin(3 * angle + phase))
        return (x - lesion.x) ** 2 + (y - lesion.y) ** 2 < wavy**2

    return keep


def _inflammation(canvas, lesion, hematoxylin, image, high):
    """A dense crowd of small, dark, round cells."""
    rng = canvas.lesion_rng
    cells, radius = (19, 0.022) if high else (30, 0.0125)
    opacity = nuclei(canvas, cells, radius, rng=rng, keep=_within(lesion, rng), density=0.95, stretch=0.05, soft=0.008)
    return over(image, (0.17, 0.13, 0.46), 0.95 * opacity)


def _necrosis(canvas, lesion, hematoxylin, image, high):
    """A pale, smudged area without nuclei but for their dust."""
    rng = canvas.lesion_rng
    smudge = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius) + 0.018 * canvas.fractal(7, 2, rng)
    pale = np.array([0.99, 0.87, 0.82], np.float32) + 0.03 * canvas.fractal(14, 2, rng)[..., None]
    image = over(image, pale, canvas.cover(smudge, 0.04))
    dust = nuclei(canvas, 26, 0.005, rng=rng, keep=_within(lesion, rng, 0.9), density=0.2)
    return over(image, (0.62, 0.42, 0.58), 0.45 * dust)


def _carcinoma(canvas, lesion, hematoxylin, image, high):
    """Crowded, large, irregular nuclei and back-to-back glands."""
    rng = canvas.lesion_rng
    area = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius) + 0.012 * canvas.noise(8, rng)
    image = over(image, (0.72, 0.40, 0.66), 0.9 * canvas.cover(area - 0.01, 0.025))
    cells, radius = (11, 0.046) if high else (17, 0.030)
    keep = _within(lesion, rng, 1.05)
    opacity = nuclei(canvas, cells, radius, rng=rng, keep=keep, density=0.9, stretch=0.7, spread=0.3, soft=0.012)
    chromatin = np.array([0.38, 0.10, 0.42], np.float32) + 0.05 * canvas.noise(30, rng)[..., None]
    image = over(image, chromatin, 0.93 * opacity)
    slit = canvas.ellipse(lesion.x, lesion.y, 0.40 * lesion.radius, 0.26 * lesion.radius, rng.uniform(-1.5, 1.5))
    lumina = np.clip((canvas.noise(10, rng) - 1.3) * 4, 0, 1) * canvas.cover(area + 0.03, 0.02)
    lumina = np.maximum(lumina, canvas.cover(slit + 0.008 * canvas.noise(14, rng), 0.012))
    return over(image, _LUMEN, 0.9 * lumina)


def _fibrosis(canvas, lesion, hematoxylin, image, high):
    """Wavy, pale strands of collagen with a few spindle nuclei."""
    rng = canvas.lesion_rng
    turn = rng.uniform(-0.6, 0.6)
    along = canvas.x * np.cos(turn) - canvas.y * np.sin(turn)
    across = canvas.y * np.cos(turn) + canvas.x * np.sin(turn)
    across = across + 0.012 * np.sin(along * rng.uniform(22, 30) + 6 * across) + 0.014 * canvas.noise(7, rng)
    strands = 0.5 + 0.5 * np.sin(across * (84 if high else 112))
    area = canvas.ellipse(lesion.x, lesion.y, lesion.radius * 1.08, lesion.radius) + 0.02 * canvas.fractal(7, 2, rng)
    color = (0.86, 0.58, 0.76) + strands[..., None] * np.array([0.12, 0.37, 0.21], np.float32)
    image = over(image, color, 0.95 * canvas.cover(area, 0.03))
    spindle = nuclei(canvas, 12, 0.010, rng=rng, keep=_within(lesion, rng, 0.9), density=0.3, stretch=1.0, soft=0.01)
    return over(image, hematoxylin, 0.8 * spindle)


_FINDINGS = {"inflammation": _inflammation, "necrosis": _necrosis, "carcinoma": _carcinoma, "fibrosis": _fibrosis}
