"""Frontal chest X-rays: what absorbs is added up, then exposed, as on film; bright is dense.

The patient's left is on the right of the image. Portable films show leads, a wider heart, low lungs and a hazy exposure.
"""

from dataclasses import dataclass

import numpy as np

from medv.phantoms.drawing.canvas import Canvas, ellipse, over, place
from medv.phantoms.scene import NORMAL, Scene

# Small and large radii.
_SIZES = {"nodule": ((0.055, 0.065), (0.115, 0.135)), "consolidation": ((0.068, 0.08), (0.16, 0.18))}


@dataclass(frozen=True)
class _Thorax:
    """Measures of one chest in unit coordinates; pairs are (image left, image right)."""

    x: float
    tilt: float
    apex: float
    width: float
    domes: tuple[float, float]
    heart: float

    @classmethod
    def sample(cls, canvas: Canvas, portable: bool) -> "_Thorax":
        base = canvas.uniform(0.745, 0.80) - 0.03 * portable
        return cls(
            x=canvas.uniform(0.48, 0.52),
            tilt=canvas.uniform(-0.05, 0.05),
            apex=canvas.uniform(0.085, 0.13),
            width=canvas.uniform(0.94, 1.08),
            domes=(base, base + canvas.uniform(0.005, 0.04)),
            heart=canvas.uniform(0.88, 1.10) * (1.22 if portable else 1.0),
        )

    def dome(self, u: np.ndarray, side: int) -> np.ndarray:
        """Height of a hemidiaphragm at lateral distance u from the midline; side is -1 or +1 in the image."""
        return self.domes[side > 0] + 2.2 * (u - 0.17) ** 2

    def lung(self, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Signed distance to one lung."""
        u = side * (x - self.x - self.tilt * (y - 0.5))
        middle = self.width * (0.135 + 0.085 * (y - self.apex))
        rx, ry = 0.145 * self.width, 0.62 - self.apex
        across, up = ((u - middle) / rx) ** 2, ((y - 0.62) / ry) ** 2
        # Less the product, the ellipse is squared towards a box: broad apices, straight flanks.
        outline = (np.sqrt(np.maximum(across + up - 0.3 * across * up, 0)) - 1.0) * rx
        return np.maximum(outline, y - self.dome(u, side))


def draw(scene: Scene, canvas: Canvas) -> np.ndarray:
    """One chest X-ray as gray values, [size, size]."""
    portable = scene.acquisition == "portable"
    thorax = _Thorax.sample(canvas, portable)
    heart = _heart(canvas, thorax)
    behind = canvas.cover(heart, 0.02)
    lungs = {side: thorax.lung(canvas.x, canvas.y, side) for side in (-1, 1)}
    air = np.maximum(*(canvas.cover(distance, 0.018) for distance in lungs.values()))
    film = _soft_tissue(canvas, thorax, air, behind)
    vessels = _vessels(canvas, thorax) * air * (1 - behind)
    bones = _bones(canvas, thorax) * (1 - 0.5 * behind)
    if scene.finding != NORMAL:
        small, large = _SIZES.get(scene.finding, ((0.07, 0.09), (0.15, 0.18)))
        dx, dy = ((0.19, 0.23), (0.14, 0.19)) if scene.level == "lower" else ((0.17, 0.20), (0.14, 0.18))
        lesion = place(scene, canvas, center=(thorax.x, 0.45), dx=dx, dy=dy, small=small, large=large)
        lung = np.maximum(lungs[lesion.sx], -heart)
        film, vessels = _FINDINGS[scene.finding](canvas, thorax, lesion, lung, film, vessels)
    film = film + 0.17 * vessels + bones
    film = _expose(canvas, film, portable)
    return _leads(canvas, thorax, film) if portable else film


def _heart(canvas: Canvas, thorax: _Thorax) -> np.ndarray:
    """Signed distance to heart and mediastinum; the apex points to the right of the image."""
    x, scale, floor = thorax.x, thorax.heart, thorax.domes[1]
    lean, rise = canvas.uniform(0.45, 0.7), canvas.uniform(0.0, 0.02)
    ventricle = canvas.ellipse(x + 0.060 * scale, floor - 0.095 - rise, 0.160 * scale, 0.108, lean)
    atrium = canvas.ellipse(x - 0.02, floor - 0.12 - rise, 0.078 * scale, 0.125)
    trunk = canvas.ellipse(x + 0.022, floor - 0.27, 0.065, 0.11, -0.25)
    u = np.abs(canvas.x - x - thorax.tilt * (canvas.y - 0.5))
    waist = u - canvas.uniform(0.038, 0.050) - 0.012 * np.cos(canvas.y * 9.0)
    knob = canvas.ellipse(x + 0.04, 0.335, canvas.uniform(0.026, 0.040), 0.045)
    return np.minimum(np.minimum(ventricle, atrium), np.minimum(np.minimum(trunk, waist), knob))


def _soft_tissue(canvas: Canvas, thorax: _Thorax, air: np.ndarray, heart: np.ndarray) -> np.ndarray:
    """Absorption without bones and vessels."""
    x, y = canvas.x, canvas.y
    u = np.abs(x - thorax.x)
    shoulder, flank = canvas.uniform(0.02, 0.06), canvas.uniform(0.41, 0.47)
    arms = np.abs(u - flank - 0.10) - 0.075 - 0.05 * (0.5 - y)
    slope = shoulder + 0.55 * np.maximum(u - 0.12, 0) ** 1.3 + 3.0 * np.maximum(u - 0.42, 0) ** 2 - y
    trunk = np.maximum(np.minimum(u - flank - 0.05 * np.clip(0.4 - y, 0, 1), arms), slope)
    body = canvas.cover(np.minimum(trunk, np.maximum(u - 0.1, y - 0.3)), 0.025)
    shade = 0.52 + 0.12 * np.cos(u * 4.0) + 0.05 * canvas.noise(3)
    side = np.where(x < thorax.x, thorax.dome(u, -1), thorax.dome(u, 1))
    belly = canvas.cover(side - y, 0.02) * (u < 0.36)
    film = body * (shade + 0.14 * belly * (1 - air))
    if canvas.uniform(0, 1) < 0.6:
        bubble = canvas.ellipse(thorax.x + canvas.uniform(0.13, 0.2), thorax.domes[1] + 0.075, 0.055, 0.03)
        film -= 0.22 * canvas.cover(bubble, 0.02)
    film -= 0.41 * air * (1 - 0.95 * heart)
    film += 0.07 * heart * canvas.cover(0.40 - y, 0.4) * (y < 0.9)
    trachea = canvas.cover(np.abs(x - thorax.x) - 0.018, 0.015) * canvas.cover(y - 0.38, 0.06)
    return film - 0.14 * trachea


def _vessels(canvas: Canvas, thorax: _Thorax) -> np.ndarray:
    """Lung markings that thin out from the hila."""
    warp = 0.25 * canvas.noise(5)
    ridges = np.exp(-((canvas.noise(11) + warp) ** 2) * 9.0) + 0.6 * np.exp(-(canvas.noise(20) ** 2) * 7.0)
    hila = [np.hypot(canvas.x - thorax.x - side * 0.095, (canvas.y - 0.47 - 0.01 * side) * 0.75) for side in (-1, 1)]
    near = np.exp(-np.minimum(*hila) * 8.0)
    return ridges * (0.12 + 0.75 * near) + 0.9 * near**2.5


def _bones(canvas: Canvas, thorax: _Thorax) -> np.ndarray:
    """Absorption of ribs, clavicles, spine and shoulder blades."""
    x, y = canvas.x, canvas.y
    u = np.abs(x - thorax.x - thorax.tilt * (y - 0.5))
    spacing, bow = canvas.uniform(0.072, 0.09), canvas.uniform(0.7, 1.3)
    slope, phase = canvas.uniform(0.35, 0.6), canvas.uniform(0, 1)
    cage = canvas.cover(ellipse(u, y, 0.0, 0.6, 0.375 * thorax.width, 0.60 - thorax.apex + 0.03), 0.04)
    back = np.cos(2 * np.pi * ((y - bow * u**2) / spacing + phase))
    front = np.cos(2 * np.pi * ((y + slope * u) / (spacing * 1.25) + phase * 1.7))
    ribs = 0.085 * np.clip(1.6 * back - 0.2, 0, 1) * (u > 0.05)
    ribs += 0.055 * np.clip(1.6 * front - 0.5, 0, 1) * np.clip((u - 0.1) * 12, 0, 1)
    ribs *= cage * np.clip((0.95 - y) * 5, 0, 1)
    rise, height = canvas.uniform(0.10, 0.3), canvas.uniform(0.15, 0.19)
    collar = np.abs(y - height + rise * (u - 0.05) - 0.03 * np.sin(u * 16)) - 0.011
    bones = ribs + 0.14 * canvas.cover(collar, 0.014) * (u > 0.03) * (u < 0.36)
    spine = canvas.cover(u - 0.03, 0.02) * (0.03 + 0.03 * np.cos(2 * np.pi * y / (spacing * 0.8)))
    blade = np.abs(ellipse(u, y, 0.41, 0.26, 0.075, 0.16, -0.25))
    return bones + spine + 0.05 * canvas.cover(blade - 0.006, 0.02)


def _expose(canvas: Canvas, film: np.ndarray, portable: bool) -> np.ndarray:
    """Gray values of an absorption: exposure, contrast and noise of one film."""
    contrast, level = canvas.uniform(1.05, 1.25), canvas.uniform(-0.03, 0.03)
    if portable:
        contrast, level = contrast * 0.78, level + 0.13
    return film * contrast + level + 0.012 * canvas.grain() * (1.6 if portable else 1.0)


def _leads(canvas: Canvas, thorax: _Thorax, film: np.ndarray) -> np.ndarray:
    """Monitoring leads: electrodes and their wires."""
    for side in (-1, 1):
        x0, y0 = thorax.x + side * canvas.uniform(0.22, 0.30), canvas.uniform(0.18, 0.26)
        bend = canvas.uniform(-0.05, 0.05)
        x1 = thorax.x + side * canvas.uniform(0.0, 0.12)
        t = np.clip((canvas.y - y0) / (1.0 - y0), 0, 1)
        wire = np.abs(canvas.x - x0 - (x1 - x0) * t - bend * np.sin(t * 6.0)) - 0.004
        film = over(film, 0.95, 0.85 * canvas.cover(wire, 0.012) * (canvas.y > y0))
        film = over(film, 1.0, canvas.cover(canvas.ellipse(x0, y0, 0.02, 0.02)))
    return film


def _effusion(canvas, thorax, lesion, lung, film, vessels):
    """Fluid: opaque from the base up to a meniscus, or a lens along the upper chest wall."""
    u = lesion.sx * (canvas.x - thorax.x)
    if lesion.sy > 0:
        top = thorax.domes[lesion.sx > 0] - (0.20 if lesion.large else 0.045) - 0.2 * lesion.radius
        fluid = top - 2.2 * np.clip(u - 0.13, 0, 1) ** 2 * (1.6 if lesion.large else 1.0) - canvas.y
    else:
        rx, ry = (0.19, 0.20) if lesion.large else (0.10, 0.115)
        fluid = ellipse(u, canvas.y, 0.315 * thorax.width, lesion.y, rx, ry, -0.25)
    opacity = canvas.cover(fluid, 0.02) * canvas.cover(lung - 0.012, 0.012)
    return over(film, 0.80, 0.95 * opacity), vessels * (1 - opacity)


def _pneumothorax(canvas, thorax, lesion, lung, film, vessels):
    """Air outside the lung: the lung is drawn in from the wall, its edge is a thin line."""
    depth, start = (0.18, -0.13) if lesion.large else (0.055, 0.04)
    near = np.clip((lesion.sy * (canvas.y - 0.46) - start) / (0.10 - start), 0, 1)
    near = near * near * (3 - 2 * near)
    inward = lesion.sx * depth * near
    collapsed = thorax.lung(canvas.x + inward, canvas.y + lesion.sy * depth * 0.7 * near, lesion.sx)
    inside = canvas.cover(lung, 0.015)
    gas = inside * canvas.cover(-collapsed, 0.01)
    line = inside * canvas.cover(np.abs(collapsed) - 0.006, 0.01) * (near > 0.1)
    dark = over(film, 0.02, 0.9 * gas)
    return dark + 0.28 * line + 0.04 * lesion.large * inside * (1 - gas), vessels * (1 - gas)


def _consolidation(canvas, thorax, lesion, lung, film, vessels):
    """A fluffy opacity with air bronchograms."""
    rng = canvas.lesion_rng
    outline = canvas.ellipse(lesion.x, lesion.y, lesion.radius, lesion.radius * (1.1 if lesion.large else 0.9))
    ragged = outline + 0.018 * canvas.fractal(9, 2, rng)
    opacity = canvas.cover(ragged, 0.07) * canvas.cover(lung, 0.02)
    bronchi = np.exp(-(canvas.noise(12, rng) ** 2) * 10.0)
    return film + opacity * (0.36 - 0.10 * bronchi), vessels * (1 - 0.7 * opacity)


def _nodule(canvas, thorax, lesion, lung, film, vessels):
    """A round dense shadow, densest in the middle like the ball that it is."""
    r = lesion.radius
    distance = canvas.ellipse(lesion.x, lesion.y, r, r * canvas.lesion_rng.uniform(0.9, 1.0), 0.7)
    opacity = canvas.cover(distance + 0.04 * r * canvas.noise(9, canvas.lesion_rng), 0.018)
    thick = 0.72 + 0.14 * np.sqrt(np.clip(-distance / r, 0, 1))
    return over(film, thick, 0.92 * opacity), vessels * (1 - opacity)


_FINDINGS = {"pleural effusion": _effusion, "pneumothorax": _pneumothorax, "consolidation": _consolidation, "nodule": _nodule}
