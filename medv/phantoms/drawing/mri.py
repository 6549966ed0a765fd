"""Axial MRI of the brain, T1 or T2: front up, the patient's left on the right of the image."""

import numpy as np

from medv.phantoms.drawing.canvas import Canvas, over, place
from medv.phantoms.scene import NORMAL, Scene

# Brightness of the tissues in the two weightings.
_TISSUE = {
    "T1": {"csf": 0.10, "gray": 0.42, "white": 0.60, "scalp": 0.88, "infarct": 0.13, "edema": 0.30},
    "T2": {"csf": 0.95, "gray": 0.52, "white": 0.34, "scalp": 0.62, "infarct": 0.93, "edema": 0.70},
}


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One MRI slice as gray values, [size, size]."""
    tissue = _TISSUE[scene.acquisition]
    center = canvas.uniform(0.485, 0.515), canvas.uniform(0.485, 0.515)
    rx, ry = canvas.uniform(0.335, 0.375), canvas.uniform(0.395, 0.43)
    tilt = canvas.uniform(-0.08, 0.08)
    egg = 1.0 + 0.10 * (canvas.y - center[1])
    head = canvas.ellipse(*center, rx, ry, tilt) / egg + 0.006 * canvas.noise(4)
    scalp, skull = canvas.uniform(0.020, 0.032), canvas.uniform(0.020, 0.03)
    brain = head + scalp + skull + 0.008
    image = tissue["scalp"] * canvas.cover(head) * (0.9 + 0.12 * canvas.noise(5))
    image = over(image, 0.05, canvas.cover(head + scalp, 0.01))
    image = over(image, tissue["csf"], canvas.cover(brain - 0.008, 0.01))
    image = _parenchyma(canvas, center, brain, tissue, image)
    image = _ventricles(canvas, center, tilt, tissue, image)
    if scene.finding != NORMAL:
        dx, dy = ((0.14, 0.16), (0.15, 0.18)) if scene.size == "large" else ((0.14, 0.18), (0.15, 0.20))
        lesion = place(scene, canvas, center=center, dx=dx, dy=dy, small=(0.065, 0.08), large=(0.13, 0.15))
        image = _FINDINGS[scene.finding](canvas, lesion, center, brain, tissue, image)
    bias = 1.0 + canvas.uniform(-0.12, 0.12) * (canvas.x - 0.5) + 0.025 * canvas.noise(2)
    return image * bias * canvas.uniform(0.93, 1.05) + 0.018 * canvas.grain() + 0.015


def _parenchyma(canvas, center, brain, tissue, image):
    """Folded cortex over white matter: sulci are cut into the depth below the surface."""
    depth = -brain
    folds = np.exp(-(canvas.noise(10) ** 2) * 24) + 0.9 * np.exp(-(canvas.noise(15) ** 2) * 18)
    atrophy = canvas.uniform(0.7, 1.15)
    below = depth - 0.004 - 0.068 * atrophy * folds * np.exp(-np.clip(depth - 0.02, 0, 1) * 9)
    midline = np.abs(canvas.x - center[0] - 0.006 * canvas.noise(6))
    end = np.abs(canvas.y - center[1])
    fissure = np.where(end > 0.13, midline - 0.004 - 0.03 * np.clip(end - 0.27, 0, 1), 1.0)
    below = np.minimum(below, fissure * 1.2)
    image = over(image, tissue["gray"], canvas.cover(-below, 0.012))
    white = tissue["white"] + 0.02 * canvas.noise(16)
    return over(image, white, canvas.cover(0.034 + 0.006 * canvas.noise(12) - below, 0.016))


def _ventricles(canvas, center, tilt, tissue, image):
    """Basal ganglia and thalami, frontal and occipital horns, third ventricle."""
    cx, cy = center
    wide, long = canvas.uniform(0.018, 0.034), canvas.uniform(0.075, 0.105)
    spread, gray = canvas.uniform(0.035, 0.05), tissue["gray"]
    for side in (-1, 1):
        nucleus = canvas.ellipse(cx + side * 0.125, cy - 0.015, 0.033, 0.085, -side * 0.25)
        thalamus = canvas.ellipse(cx + side * 0.052, cy + 0.045, 0.042, 0.052, side * 0.3)
        image = over(image, gray, 0.85 * canvas.cover(np.minimum(nucleus, thalamus), 0.018))
    for side in (-1, 1):
        horn = canvas.ellipse(cx + side * spread, cy - 0.075, wide, long * 0.75, -side * 0.35)
        occipital = canvas.ellipse(cx + side * (spread + 0.055), cy + 0.135, wide * 0.75, long * 0.6, -side * 0.45)
        image = over(image, tissue["csf"], canvas.cover(np.minimum(horn, occipital), 0.012))
    third = canvas.ellipse(cx, cy + 0.03, canvas.uniform(0.006, 0.012), 0.05)
    return over(image, tissue["csf"], canvas.cover(third, 0.010))


def _tumor(canvas, lesion, center, brain, tissue, image):
    """A bright ring of uneven width around a dark core."""
    rng = canvas.lesion_rng
    r = lesion.radius
    distance = canvas.ellipse(lesion.x, lesion.y, r, r * rng.uniform(0.85, 1.0), rng.uniform(-1, 1))
    distance = distance + 0.010 * canvas.noise(10, rng)
    inside = canvas.cover(brain, 0.01)
    image = over(image, 0.20 + 0.06 * canvas.noise(18, rng), canvas.cover(distance, 0.012) * inside)
    width = np.clip(0.015 + 0.004 * canvas.noise(9, rng), 0.010, 0.024)
    return over(image, 0.97, canvas.cover(np.abs(distance + 0.014) - width, 0.014) * inside)


def _infarct(canvas, lesion, center, brain, tissue, image):
    """A wedge with its point at the ventricle and its base on the cortex."""
    at = np.arctan2((lesion.y - center[1]) * 0.9, lesion.x - center[0])
    tip = 0.08 if lesion.large else 0.16
    tx, ty = center[0] + tip * np.cos(at) * 0.8, center[1] + tip * np.sin(at)
    dx, dy = canvas.x - tx, canvas.y - ty
    along, across = dx * np.cos(at) + dy * np.sin(at), dy * np.cos(at) - dx * np.sin(at)
    half = 0.66 if lesion.large else 0.42
    wedge = np.maximum((np.abs(across) - 0.012) - half * along, brain) + 0.009 * canvas.fractal(9, 2, canvas.lesion_rng)
    return over(image, tissue["infarct"], 0.95 * canvas.cover(wedge, 0.018))


def _hemorrhage(canvas, lesion, center, brain, tissue, image):
    """Blotches of very bright and very dark blood within a dark rim."""
    rng = canvas.lesion_rng
    distance = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * 0.85, rng.uniform(-1, 1))
    distance = distance + 0.016 * canvas.fractal(8, 2, rng)
    inside = canvas.cover(brain, 0.01)
    image = over(image, 0.0, canvas.cover(distance - 0.008, 0.015) * inside)
    core = canvas.cover(distance + 0.35 * lesion.radius, 0.7 * lesion.radius)
    blood = np.clip(0.65 + 0.60 * canvas.noise(22, rng) + core, 0.05, 1.0)
    return over(image, blood, canvas.cover(distance + 0.018, 0.02) * inside)


def _edema(canvas, lesion, center, brain, tissue, image):
    """Fingers of swelling along the white matter; the cortex is spared."""
    rng = canvas.lesion_rng
    angle = np.arctan2(canvas.y - lesion.y, canvas.x - lesion.x)
    fingers = np.sin(int(rng.integers(5, 7)) * angle + rng.uniform(0, 6)) * 0.28 * lesion.radius
    distance = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * 1.1) - fingers + 0.01 * canvas.noise(9, rng)
    own = canvas.cover(0.025 - lesion.sx * (canvas.x - center[0]), 0.02)
    opacity = canvas.cover(distance - 0.018, 0.045) * canvas.cover(brain + 0.035, 0.03) * own
    return over(image, tissue["edema"], 0.92 * opacity)


_FINDINGS = {"tumor": _tumor, "infarct": _infarct, "hemorrhage": _hemorrhage, "edema": _edema}
