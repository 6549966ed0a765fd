"""Histology in hematoxylin and eosin: pink stroma, purple nuclei, glands around pale lumina; sides are the image's."""

import numpy as np

from medv.data.drawing.canvas import Canvas, Lesion, over, place
from medv.data.drawing.cells import nuclei
from medv.data.scene import NORMAL, Scene

_LUMEN = (0.95, 0.92, 0.95)


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One field of view as RGB values, [size, size, 3]."""
    high = scene.acquisition == "high power"
    eosin = np.array([canvas.uniform(0.88, 0.95), canvas.uniform(0.64, 0.74), canvas.uniform(0.78, 0.86)], np.float32)
    hematoxylin = np.array(
        [canvas.uniform(0.36, 0.46), canvas.uniform(0.22, 0.32), canvas.uniform(0.55, 0.64)], np.float32
    )
    image = _stroma(canvas, eosin, high)
    lesion = _place(scene, canvas) if scene.finding != NORMAL else None
    clear = _clearing(canvas, lesion)
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
    clefts = np.exp(-(canvas.noise(6 if high else 11) ** 2) * 90)
    return over(image, (0.97, 0.93, 0.96), 0.55 * clefts)


def _glands(canvas, hematoxylin, image, high, clear):
    """Round glands: a pale lumen, pink-purple epithelium and a ring of basal nuclei."""
    count = 2 if high else 5
    for _ in range(count):
        x, y = canvas.uniform(0.02, 0.98), canvas.uniform(0.02, 0.98)
        r = canvas.uniform(0.13, 0.17) if high else canvas.uniform(0.065, 0.09)
        beads, turn = int(2 * np.pi * r / (0.085 if high else 0.038)), canvas.uniform(0, 6)
        gland = canvas.ellipse(x, y, r, r * canvas.uniform(0.7, 1.0), turn)
        angle = np.arctan2(canvas.y - y, canvas.x - x)
        image = over(image, (0.84, 0.62, 0.80), 0.8 * canvas.cover(gland, 0.01) * clear)
        image = over(image, _LUMEN, canvas.cover(gland + 0.55 * r, 0.012) * clear)
        ring = canvas.cover(np.abs(gland + 0.17 * r) - 0.12 * r, 0.012) * np.clip(0.75 + np.cos(beads * angle), 0, 1)
        image = over(image, hematoxylin + 0.03, 0.9 * ring * clear)
    return image


def _place(scene: Scene, canvas: Canvas) -> Lesion:
    dx, dy = ((0.20, 0.24), (0.20, 0.24)) if scene.size == "large" else ((0.17, 0.27), (0.17, 0.27))
    return place(scene, canvas, center=(0.5, 0.5), dx=dx, dy=dy, small=(0.085, 0.10), large=(0.175, 0.20))


def _clearing(canvas: Canvas, lesion: Lesion | None) -> np.ndarray | float:
    """1 where normal structures stand, 0 where a lesion has replaced them."""
    if lesion is None:
        return 1.0
    return 1.0 - canvas.cover(canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius), 0.03)


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
    cells, radius = (18, 0.021) if high else (30, 0.0125)
    opacity = nuclei(canvas, cells, radius, rng=rng, keep=_within(lesion, rng), density=0.95, stretch=0.05, soft=0.008)
    return over(image, (0.22, 0.12, 0.42), 0.95 * opacity)


def _necrosis(canvas, lesion, hematoxylin, image, high):
    """A pale, smudged area without nuclei."""
    rng = canvas.lesion_rng
    smudge = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius) + 0.012 * canvas.noise(9, rng)
    pale = np.array([0.98, 0.80, 0.78], np.float32) + 0.02 * canvas.noise(22, rng)[..., None]
    return over(image, pale, canvas.cover(smudge, 0.035))


def _carcinoma(canvas, lesion, hematoxylin, image, high):
    """Crowded, large, irregular nuclei and back-to-back glands."""
    rng = canvas.lesion_rng
    area = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius) + 0.01 * canvas.noise(8, rng)
    image = over(image, (0.70, 0.46, 0.72), 0.9 * canvas.cover(area, 0.02))
    cells, radius = (8, 0.060) if high else (14, 0.034)
    opacity = nuclei(canvas, cells, radius, rng=rng, keep=_within(lesion, rng), stretch=0.9, spread=0.3, soft=0.012)
    image = over(image, (0.30, 0.10, 0.44), 0.95 * opacity)
    lumina = np.clip((canvas.noise(9, rng) - 1.1) * 4, 0, 1) * canvas.cover(area + 0.02, 0.02)
    return over(image, _LUMEN, lumina)


def _fibrosis(canvas, lesion, hematoxylin, image, high):
    """Wavy, pale strands of collagen."""
    rng = canvas.lesion_rng
    turn = rng.uniform(-0.7, 0.7)
    across = canvas.y * np.cos(turn) + canvas.x * np.sin(turn) + 0.016 * canvas.noise(6, rng)
    strands = 0.5 + 0.5 * np.sin(across * (95 if high else 140))
    area = canvas.cover(
        canvas.ellipse(lesion.x, lesion.y, lesion.radius * 1.05, lesion.radius) + 0.01 * canvas.noise(8, rng), 0.03
    )
    color = (0.90, 0.70, 0.80) + strands[..., None] * np.array([0.08, 0.24, 0.17], np.float32)
    return over(image, color, 0.95 * area)


_FINDINGS = {"inflammation": _inflammation, "necrosis": _necrosis, "carcinoma": _carcinoma, "fibrosis": _fibrosis}
