"""Paints scenes, many at once, on whatever device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scenes import PALETTE, SLOTS, TEXTURES, Scene
from torch import Tensor
from torch.nn import functional as F

_FINER = 2  # painted at this multiple of the size, then averaged
_HOLE = {"ring": 0.55}

Texture = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dots(u: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return ((u % 1 - 0.5).square() + (v % 1 - 0.5).square() < 0.09).float()


_TEXTURES: dict[str, Texture] = {
    "plain": lambda u, v, r: torch.zeros_like(u),
    "striped": lambda u, v, r: (u % 1 < 0.5).float(),
    "dotted": _dots,
    "checkered": lambda u, v, r: ((u % 1 < 0.5) ^ (v % 1 < 0.5)).float(),
    "ringed": lambda u, v, r: (r % 1 < 0.5).float(),
    "shaded": lambda u, v, r: torch.sigmoid(2 * v),
    "wavy": lambda u, v, r: ((u + 0.25 * torch.sin(2 * math.pi * 0.6 * v)) % 1 < 0.5).float(),
}


def _pale(colour: np.ndarray, share: float) -> np.ndarray:
    return colour * (1 - share) + share


def _pack(scenes: list[Scene], device: torch.device) -> dict[str, Tensor]:
    """What the painter needs, a row a scene."""
    count = len(scenes)
    numbers = np.zeros((count, SLOTS, 9), np.float32)  # x, y, size, angle, texture, frequency, its angle, hole, there
    colours = np.zeros((count, SLOTS, 2, 3), np.float32)
    outlines = np.ones((count, SLOTS, 256), np.float32)
    back = np.zeros((count, 5), np.float32)  # texture, frequency, angle, shift
    ground = np.zeros((count, 2, 3), np.float32)
    waves = np.zeros((count, 3, 6), np.float32)
    whole = np.zeros((count, 3), np.float32)  # fold, turn, period
    for i, scene in enumerate(scenes):
        own = scene.back
        back[i] = (TEXTURES.index(own["texture"]), own["frequency"], own["angle"], *own["shift"])
        colour = np.array(PALETTE[own["colour"]])
        ground[i], waves[i] = (_pale(colour, 0.35), _pale(colour, 0.62)), own["waves"]
        whole[i] = (("none", "mirror", "quarters", "six", "eight").index(scene.fold), scene.turn, scene.period)
        for j, (thing, x, y, size, angle) in enumerate(scene.things):
            texture = TEXTURES.index(thing.texture)
            hole = _HOLE.get(thing.shape, 0.0)
            numbers[i, j] = (x, y, size, angle, texture, thing.frequency, thing.angle, hole, 1)
            colour = np.array(PALETTE[thing.colour])
            colours[i, j] = (colour, _pale(colour, 0.55) if colour.sum() < 2.4 else 0.72 * colour)
            outlines[i, j] = thing.outline
    arrays = {
        "numbers": numbers,
        "colours": colours,
        "outlines": outlines,
        "back": back,
        "ground": ground,
        "waves": waves,
        "whole": whole,
    }
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * x + sin * y, cos * y - sin * x


def _rows(scenes: list[Scene], device: torch.device) -> list[dict[str, Tensor]]:
    """Scenes of each texture, for the background and then for each slot, sent to the device at once.

    Which they are is known on the host, so that nothing waits for the device.
    """
    slots = max(len(scene.things) for scene in scenes)
    kinds = [[str(scene.back["texture"]) for scene in scenes]]
    kinds += [[s.things[i][0].texture if i < len(s.things) else "plain" for s in scenes] for i in range(slots)]
    found = [{n: [i for i, kind in enumerate(own) if kind == n] for n in _TEXTURES} for own in kinds]
    flat = torch.tensor([i for places in found for rows in places.values() for i in rows])
    parts = iter(flat.to(device).split([len(rows) for places in found for rows in places.values()]))
    return [{name: next(parts) for name in places} for places in found]


def _textured(places: dict[str, Tensor], u: Tensor, v: Tensor, r: Tensor, base: Tensor) -> Tensor:
    """The texture of each scene; ``base`` where it has none of its own."""
    value = base.clone()
    for name, rows in places.items():
        if len(rows):
            value[rows] = _TEXTURES[name](u[rows], v[rows], r[rows])
    return value


def _folded(x: Tensor, y: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates behind the mirrors of each scene."""
    kind = whole[:, 0].view(-1, 1, 1)
    x, y = _turned(x, y, whole[:, 1])
    sides = torch.where(kind == 3, 6.0, 8.0)
    wedge = 2 * math.pi / sides
    angle, radius = torch.atan2(y, x) % wedge, (x.square() + y.square()).sqrt()
    angle = torch.minimum(angle, wedge - angle)
    around = kind >= 3
    fx = torch.where(around, radius * angle.cos(), torch.where(kind >= 1, x.abs(), x))
    fy = torch.where(around, radius * angle.sin(), torch.where(kind == 2, y.abs(), y))
    return fx, fy


def _ground(parts: dict[str, Tensor], places: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The background [B, H, W, 3]."""
    frequency, angle = parts["back"][:, 1], parts["back"][:, 2]
    waves = parts["waves"]
    kx, ky, phase = (waves[:, i].view(len(waves), -1, 1, 1) for i in range(3))
    clouds = torch.sigmoid(0.9 * (kx * x[:, None] + ky * y[:, None] + phase).cos().sum(1))
    u, v = _turned(x, y, angle)
    scale = 0.5 * frequency.view(-1, 1, 1)
    u, v = u * scale + parts["back"][:, 3].view(-1, 1, 1), v * scale + parts["back"][:, 4].view(-1, 1, 1)
    mix = _textured(places, u, v, u, clouds)[..., None]
    colours = parts["ground"].view(-1, 2, 1, 1, 3)
    return colours[:, 0] * (1 - mix) + colours[:, 1] * mix


def _add(
    picture: Tensor, parts: dict[str, Tensor], places: dict[str, Tensor], slot: int, x: Tensor, y: Tensor, pixel: float
) -> Tensor:
    """The picture with one object more."""
    n = [parts["numbers"][:, slot, i].view(-1, 1, 1) for i in range(9)]
    period = parts["whole"][:, 2].view(-1, 1, 1)
    dx, dy = x - n[0], y - n[1]
    step = period.clamp_min(1e-3)
    repeated = period > 0
    dx = torch.where(repeated, (dx + step / 2) % step - step / 2, dx)
    dy = torch.where(repeated, (dy + step / 2) % step - step / 2, dy)
    size = n[2].clamp_min(1e-3)
    u, v = _turned(dx / size, dy / size, parts["numbers"][:, slot, 3])
    radius = (u.square() + v.square()).sqrt()
    place = torch.atan2(v, u) / (2 * math.pi) % 1 * 256
    low = place.floor().long() % 256
    edge, table = place - place.floor(), parts["outlines"][:, slot]
    flat = low.flatten(1)
    near, far = table.gather(1, flat), table.gather(1, (flat + 1) % 256)
    reach = (near.view_as(u) * (1 - edge) + far.view_as(u) * edge).clamp_min(1e-3)
    depth = torch.minimum(reach - radius, torch.where(n[7] > 0, radius - n[7] * reach, torch.inf)) * size / pixel
    inside = (depth + 0.5).clamp(0, 1) * n[8]
    a, b = _turned(u, v, parts["numbers"][:, slot, 6])
    scale = 0.5 * n[5]
    mix = _textured(places, a * scale, b * scale, radius * scale, torch.zeros_like(u))[..., None]
    first, second = (parts["colours"][:, slot, i].view(-1, 1, 1, 3) for i in range(2))
    colour = first * (1 - mix) + second * mix
    rim = (depth * pixel < 0.022)[..., None]
    colour = torch.where(rim, 0.35 * first, colour)
    return torch.lerp(picture, colour, inside[..., None])


@torch.no_grad()
def paint(scenes: list[Scene], size: int, device: torch.device) -> Tensor:
    """Pictures [B, 3, size, size] from -1 to 1."""
    parts = _pack(scenes, device)
    side = size * _FINER
    line = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = (c.expand(len(scenes), -1, -1) for c in torch.meshgrid(line, line, indexing="ij"))
    x, y = _folded(x, y, parts["whole"])
    back, *slots = _rows(scenes, device)
    picture = _ground(parts, back, x, y)
    for slot, places in enumerate(slots):
        picture = _add(picture, parts, places, slot, x, y, 2 / side)
    return F.avg_pool2d(picture.permute(0, 3, 1, 2), _FINER) * 2 - 1
