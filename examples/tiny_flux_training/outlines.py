"""Outlines of objects: the distance of the edge from the middle at 256 angles, at most 1."""

from __future__ import annotations

import math

import numpy as np

#: Angles of an outline, from the right, clockwise on a picture.
ANGLES = np.linspace(0, 2 * math.pi, 256, endpoint=False)


def _scaled(radius: np.ndarray) -> np.ndarray:
    return (radius / radius.max()).astype(np.float32)


def _polygon(corners: np.ndarray) -> np.ndarray:
    """Where rays from the middle leave a polygon that can be seen from there as a whole."""
    ends = np.roll(corners, -1, axis=0)
    rays = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)[:, None]
    edges = (ends - corners)[None]
    across = rays[..., 0] * edges[..., 1] - rays[..., 1] * edges[..., 0]
    across = np.where(np.abs(across) < 1e-9, 1e-9, across)
    far = (corners[None, :, 0] * edges[..., 1] - corners[None, :, 1] * edges[..., 0]) / across
    along = (corners[None, :, 0] * rays[..., 1] - corners[None, :, 1] * rays[..., 0]) / across
    hit = (far > 0) & (along >= -1e-6) & (along <= 1 + 1e-6)
    return _scaled(np.where(hit, far, 0).max(1))


def _corners(count: int, radii: tuple[float, ...] = (1.0,), turn: float = -math.pi / 2) -> np.ndarray:
    angles = turn + 2 * math.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 200, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 1], 1)


def _cross(arm: float = 0.34) -> np.ndarray:
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turned = [quarter]
    for _ in range(3):
        turned.append(np.stack([-turned[-1][:, 1], turned[-1][:, 0]], 1))
    return np.concatenate(turned)


def blob(chance: np.random.Generator) -> np.ndarray:
    """An outline that no other picture has."""
    radius = np.ones_like(ANGLES)
    for wave in range(2, 7):
        radius += chance.normal(0, 0.45 / wave) * np.cos(wave * ANGLES + chance.uniform(0, 2 * math.pi))
    return _scaled(np.clip(radius, 0.25, None))


#: Outlines by the word for them. A ring is a circle that the painter gives a hole.
OUTLINES: dict[str, np.ndarray] = {
    "circle": _scaled(np.ones_like(ANGLES)),
    "ring": _scaled(np.ones_like(ANGLES)),
    "square": _polygon(_corners(4, turn=math.pi / 4)),
    "triangle": _polygon(_corners(3)),
    "diamond": _polygon(_corners(4, (1.0, 0.62))),
    "hexagon": _polygon(_corners(6)),
    "star": _polygon(_corners(10, (1.0, 0.42))),
    "cross": _polygon(_cross()),
    "heart": _polygon(_heart()),
    "flower": _scaled(0.72 + 0.28 * np.cos(6 * ANGLES)),
    "gear": _scaled(0.86 + 0.14 * np.tanh(4 * np.sin(9 * ANGLES))),
    "house": _polygon(np.array([[0, -1.0], [0.8, -0.25], [0.8, 0.85], [-0.8, 0.85], [-0.8, -0.25]])),
}
