"""Axial CT of the upper abdomen in a soft-tissue window: front up, the patient's left on the right of the image."""

import numpy as np

from medv.phantoms.drawing.canvas import Canvas, over, place
from medv.phantoms.scene import NORMAL, Scene

_FAT, _MUSCLE, _BONE, _FLUID = 0.20, 0.47, 0.97, 0.33


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One CT slice as gray values, [size, size]."""
    contrast = scene.acquisition == "contrast"
    rx, ry = canvas.uniform(0.41, 0.465), canvas.uniform(0.33, 0.385)
    center = canvas.uniform(0.485, 0.515), canvas.uniform(0.475, 0.505)
    fat = canvas.uniform(0.02, 0.055)
    # A body is a rounded box rather than an ellipse: taking the product away pushes its corners out.
    u, v = (canvas.x - center[0]) / rx, (canvas.y - center[1]) / ry
    round_ = np.sqrt(u**2 + v**2 - 0.22 * u**2 * v**2) + 0.012 * canvas.noise(4)
    skin = (round_ - 1.0) * ry
    cavity = skin + fat + 0.05
    image = _wall(canvas, center, rx, ry, skin, fat, cavity)
    image = _organs(canvas, center, rx, ry, cavity, image, contrast)
    if scene.finding != NORMAL:
        dx, dy = ((0.18, 0.22), (0.11, 0.14)) if scene.size == "large" else ((0.17, 0.25), (0.12, 0.16))
        calcified = scene.finding == "calcification"
        small, large = ((0.062, 0.07), (0.12, 0.13)) if calcified else ((0.07, 0.085), (0.145, 0.165))
        lesion = place(scene, canvas, center=center, dx=dx, dy=dy, small=small, large=large)
        image = _FINDINGS[scene.finding](canvas, lesion, center, cavity, image)
    image = _spine(canvas, center, ry, image, contrast)
    window, level = canvas.uniform(0.94, 1.08), canvas.uniform(-0.025, 0.025)
    image = image + canvas.cover(skin) * (level + 0.022 * canvas.grain() + 0.012 * canvas.noise(24))
    return image * window + 0.02


def _wall(canvas, center, rx, ry, skin, fat, cavity):
    """Table, skin, fat, muscle and ribs; the cavity is left full of fat."""
    table = np.abs(canvas.y - center[1] - ry - 0.055 + 0.35 * (canvas.x - 0.5) ** 2) - 0.005
    image = 0.55 * canvas.cover(table, 0.01) * (np.abs(canvas.x - 0.5) < 0.34)
    image = over(image, 0.5, canvas.cover(skin))
    image = over(image, _FAT, canvas.cover(skin + 0.012, 0.012))
    image = over(image, _MUSCLE, canvas.cover(skin + fat, 0.012))
    angle = np.arctan2((canvas.y - center[1]) / ry, (canvas.x - center[0]) / rx)
    ribs = np.cos(angle * canvas.rng.integers(9, 13) + canvas.uniform(0, 6)) - 0.55
    band = canvas.cover(np.abs(skin + fat + 0.026) - 0.011, 0.012)
    image = over(image, 0.92, band * np.clip(ribs * 5, 0, 1) * (np.sin(angle) > -0.65) * (np.sin(angle) < 0.9))
    return over(image, _FAT + 0.02, canvas.cover(cavity, 0.012))


def _organs(canvas, center, rx, ry, cavity, image, contrast):
    """Liver, spleen, stomach, bowel, kidneys and great vessels."""
    cx, cy = center
    texture = 0.018 * canvas.noise(18)
    inside = canvas.cover(cavity + 0.006, 0.01)
    warp = 0.012 * canvas.noise(5)
    organ = 0.63 if contrast else 0.57
    bowel = canvas.noise(13)
    loops = np.clip(0.5 + 2.0 * bowel, 0, 1) * canvas.cover(canvas.ellipse(cx + 0.10, cy - 0.05, 0.24, 0.19) + warp, 0.05)
    image = over(image, 0.50, 0.85 * loops * inside)
    stomach = canvas.ellipse(cx + canvas.uniform(0.14, 0.19), cy - ry * 0.42, 0.135, 0.095, canvas.uniform(-0.5, 0.3))
    image = over(image, 0.50, canvas.cover(stomach + warp, 0.012) * inside)
    gas = canvas.ellipse(cx + canvas.uniform(0.07, 0.12), cy - ry * 0.62, canvas.uniform(0.025, 0.05), 0.017)
    image = over(image, 0.0, canvas.cover(gas, 0.01) * inside)
    spleen = canvas.ellipse(cx + rx * 0.66, cy + ry * 0.28, 0.085, canvas.uniform(0.12, 0.16), canvas.uniform(0.1, 0.4))
    image = over(image, organ + 0.02 + texture, canvas.cover(spleen + warp, 0.012) * inside)
    right = canvas.ellipse(cx - rx * 0.50, cy - 0.01, rx * 0.52, ry * canvas.uniform(0.70, 0.80), canvas.uniform(-0.15, 0.1))
    lobe = canvas.ellipse(cx - 0.05, cy - ry * 0.48, canvas.uniform(0.16, 0.22), 0.075, canvas.uniform(-0.2, 0.1))
    liver = canvas.cover(np.minimum(right, lobe) + warp, 0.014) * inside
    image = over(image, organ + texture, liver)
    branches = np.exp(-(canvas.noise(8) ** 2) * 60) * canvas.cover(right + 0.03, 0.05)
    image = image + (0.13 if contrast else -0.05) * branches * liver
    for side in (-1, 1):
        x, y = cx + side * canvas.uniform(0.145, 0.17), cy + ry * canvas.uniform(0.40, 0.52)
        angle = -side * canvas.uniform(0.3, 0.7)
        kidney = canvas.ellipse(x, y, canvas.uniform(0.050, 0.060), canvas.uniform(0.070, 0.085), angle)
        image = over(image, _FAT + 0.02, canvas.cover(kidney - 0.012, 0.015))
        image = over(image, 0.82 if contrast else 0.50, canvas.cover(kidney, 0.010))
        sinus = canvas.ellipse(x - side * 0.022, y, 0.018, 0.03, angle)
        image = over(image, 0.50 if contrast else 0.30, canvas.cover(sinus, 0.02))
    vessel = 0.93 if contrast else 0.46
    aorta = canvas.ellipse(cx + canvas.uniform(0.01, 0.03), cy + ry * 0.30, canvas.uniform(0.027, 0.036), 0.031)
    cava = canvas.ellipse(cx - canvas.uniform(0.05, 0.07), cy + ry * 0.27, canvas.uniform(0.028, 0.036), 0.025)
    image = over(image, _FAT + 0.02, canvas.cover(np.minimum(aorta, cava) - 0.01, 0.012))
    image = over(image, vessel, canvas.cover(aorta, 0.008))
    return over(image, vessel - 0.14 * contrast, canvas.cover(cava, 0.008))


def _spine(canvas, center, ry, image, contrast):
    """Vertebra with canal and processes, and the muscles beside it."""
    cx, y = center[0], center[1] + ry * 0.55
    for side in (-1, 1):
        muscle = canvas.ellipse(cx + side * 0.085, y + 0.085, 0.065, 0.042, side * 0.3)
        image = over(image, _MUSCLE, canvas.cover(muscle, 0.015))
    body = canvas.ellipse(cx, y, canvas.uniform(0.055, 0.065), canvas.uniform(0.045, 0.053))
    process = canvas.segment(cx, y + 0.06, cx, y + 0.115) - 0.013
    wings = canvas.segment(cx - 0.075, y + 0.072, cx + 0.075, y + 0.072) - 0.011
    image = over(image, _BONE - 0.12 + 0.05 * canvas.noise(22), canvas.cover(body, 0.01))
    image = over(image, _BONE, canvas.cover(np.abs(body) - 0.006, 0.01))
    image = over(image, _BONE, canvas.cover(np.minimum(process, wings), 0.01))
    return over(image, 0.42, canvas.cover(canvas.ellipse(cx, y + 0.062, 0.021, 0.018), 0.008))


def _cyst(canvas, lesion, center, cavity, image):
    """Dark, smooth and round within a cuff of the organ that it grew from."""
    distance = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * 0.95)
    inside = canvas.cover(cavity + 0.004, 0.01)
    image = over(image, 0.60, canvas.cover(distance - 0.03, 0.02) * inside)
    return over(image, _FLUID - 0.16, canvas.cover(distance, 0.012) * inside)


def _calcification(canvas, lesion, center, cavity, image):
    """Clumps as bright as bone around a solid middle."""
    rng = canvas.lesion_rng
    distance = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * 0.85, rng.uniform(-1, 1))
    inside = canvas.cover(cavity + 0.004, 0.01)
    image = over(image, 0.50, canvas.cover(distance - 0.03, 0.03) * inside)
    grit = np.clip(canvas.noise(20, rng) * 1.5 + 1.2, 0, 1)
    clumps = canvas.cover(distance + 0.13 * lesion.radius * canvas.fractal(13, 2, rng), 0.014)
    solid = canvas.cover(distance + 0.3 * lesion.radius, 0.4 * lesion.radius)
    return over(image, 1.08, clumps * np.maximum(grit, solid) * inside)


def _mass(canvas, lesion, center, cavity, image):
    """Lobulated: an uneven, partly dying core within a thick brighter rim."""
    rng = canvas.lesion_rng
    angle = np.arctan2(canvas.y - lesion.y, canvas.x - lesion.x)
    lobes = 0.08 * np.sin(int(rng.integers(4, 7)) * angle + rng.uniform(0, 6))
    lobes = lobes + 0.06 * np.sin(3 * angle + rng.uniform(0, 6))
    distance = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius) - lobes * lesion.radius
    inside = canvas.cover(cavity - 0.006, 0.012)
    image = over(image, _FAT, canvas.cover(distance - 0.010, 0.012) * inside)
    image = over(image, 0.78 + 0.05 * canvas.noise(20, rng), canvas.cover(distance, 0.014) * inside)
    core = np.clip(0.48 + 0.15 * canvas.noise(15, rng), 0.25, 0.75)
    return over(image, core, canvas.cover(distance + 0.022 + 0.12 * lesion.radius, 0.025) * inside)


def _collection(canvas, lesion, center, cavity, image):
    """A dark crescent along the wall with a thin enhancing border."""
    angle = np.arctan2(canvas.y - center[1], canvas.x - center[0])
    at = np.arctan2(lesion.sy * 0.62, lesion.sx * 0.80)
    away = np.abs((angle - at + np.pi) % (2 * np.pi) - np.pi)
    depth, reach = (0.17, 0.72) if lesion.large else (0.09, 0.38)
    inner = depth * np.sqrt(np.clip(1 - (away / reach) ** 2, 0, 1)) - 0.1 * np.clip(away / reach - 0.95, 0, 1)
    crescent = np.maximum(cavity, -cavity - inner)
    image = over(image, 0.72, canvas.cover(crescent - 0.016, 0.014))
    return over(image, _FLUID + 0.03, canvas.cover(crescent, 0.012))


_FINDINGS = {"cyst": _cyst, "calcification": _calcification, "mass": _mass, "fluid collection": _collection}
