"""Scenes and the sentences that describe them, drawn by chance from a small grammar.

A scene is a background and up to nine objects. What the sentence leaves open (the outline of a blob, clouds, angles,
places within reason) is chance, but the same within a picture: equal blobs have one outline, patterns one period, both
sides of a mirror the same content. To get that right, far parts of a picture must look at each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from outlines import OUTLINES, blob

#: Objects in a scene at most.
SLOTS = 9
PALETTE = {
    "red": (0.86, 0.15, 0.15),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.97, 0.85, 0.15),
    "green": (0.20, 0.66, 0.25),
    "teal": (0.10, 0.66, 0.66),
    "blue": (0.15, 0.35, 0.85),
    "purple": (0.52, 0.22, 0.75),
    "pink": (0.96, 0.52, 0.72),
    "brown": (0.50, 0.30, 0.16),
    "black": (0.10, 0.10, 0.12),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.55, 0.56, 0.58),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "ringed", "shaded", "wavy", "cloudy")
ON_OBJECTS, ON_BACKGROUNDS = (
    TEXTURES[:6],
    ("plain", "plain", "striped", "dotted", "checkered", "wavy", "cloudy", "cloudy"),
)
FOLDS = ("none", "mirror", "quarters", "six", "eight")
NUMBERS = {4: "four", 6: "six", 8: "eight", 9: "nine"}


def _a(words: str) -> str:
    """With the article before it."""
    return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass
class Thing:
    """An object: words for it and how it looks."""

    shape: str
    colour: str
    texture: str
    outline: np.ndarray
    frequency: float
    angle: float

    def words(self, many: bool = False) -> str:
        """Such as ``striped red star``."""
        name = self.shape if not many else self.shape + ("es" if self.shape.endswith("s") else "s")
        return " ".join(([self.texture] if self.texture != "plain" else []) + [self.colour, name])


@dataclass
class Scene:
    """A picture to paint, in coordinates from -1 to 1, x to the right and y down."""

    text: str = ""
    back: dict[str, object] = field(default_factory=dict)
    fold: str = "none"
    turn: float = 0.0
    things: list[tuple[Thing, float, float, float, float]] = field(default_factory=list)  # x, y, size, angle
    period: float = 0.0  # of a pattern; every second row of the second thing stands between the first

    def put(self, thing: Thing, x: float, y: float, size: float, angle: float = 0.0) -> None:
        """Add an object."""
        self.things.append((thing, x, y, size, angle))


class Grammar:
    """Draws scenes.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.kinds = (self.one, self.two, self.three, self.grid, self.wreath, self.pattern, self.kaleidoscope)
        self.shares = np.cumsum([0.18, 0.24, 0.12, 0.16, 0.10, 0.10, 0.10])

    def draw(self) -> Scene:
        """A scene of any kind."""
        return self.kinds[int(np.searchsorted(self.shares, self.chance.random() * self.shares[-1]))]()

    def pick(self, options: tuple[str, ...] | list[str]) -> str:
        """One of them."""
        return options[int(self.chance.random() * len(options))]

    def between(self, low: float, high: float) -> float:
        """A number."""
        return low + (high - low) * self.chance.random()

    def start(self) -> Scene:
        """A scene with a background; its text is that of the background."""
        texture, colour = self.pick(ON_BACKGROUNDS), self.pick(list(PALETTE))
        scene = Scene(text="on " + _a(" ".join(([texture] if texture != "plain" else []) + [colour, "background"])))
        waves = np.stack([self.chance.normal(0, 1.8, 6), self.chance.normal(0, 1.8, 6), self.chance.uniform(0, 6.3, 6)])
        scene.back = {
            "texture": texture,
            "colour": colour,
            "frequency": self.between(4.0, 7.0),
            "angle": self.between(0.0, math.pi),
            "shift": (self.between(0, 2), self.between(0, 2)),
            "waves": waves,
        }
        return scene

    def thing(self, scene: Scene, blobs: float = 0.15, unlike: str = "") -> Thing:
        """An object of another colour than the background, and than ``unlike``."""
        colour = self.pick([c for c in PALETTE if c not in (scene.back["colour"], unlike)])
        shape = "blob" if self.chance.random() < blobs else self.pick(list(OUTLINES))
        outline = blob(self.chance) if shape == "blob" else OUTLINES[shape]
        texture = "plain" if self.chance.random() < 0.5 else self.pick(ON_OBJECTS)
        return Thing(shape, colour, texture, outline, self.between(3.0, 4.5), self.between(0, math.pi))

    def tilt(self) -> float:
        """A small angle."""
        return self.between(-0.3, 0.3)

    def one(self) -> Scene:
        """A single object, small or large."""
        scene = self.start()
        thing, large = self.thing(scene), self.chance.random() < 0.5
        size = self.between(0.62, 0.8) if large else self.between(0.28, 0.4)
        reach = 0.9 - size
        scene.put(thing, self.between(-reach, reach), self.between(-reach, reach), size, self.tilt())
        scene.text = f"a {'large' if large else 'small'} {thing.words()} {scene.text}"
        return scene

    def two(self) -> Scene:
        """Two objects side by side, above each other or one in the other."""
        scene = self.start()
        first = self.thing(scene)
        second = self.thing(scene, unlike=first.colour)
        how = self.pick(["left of", "above", "inside"])
        jitter = [self.between(-0.1, 0.1) for _ in range(4)]
        if how == "inside":
            scene.put(second, 0.5 * jitter[0], 0.5 * jitter[1], self.between(0.75, 0.85), self.tilt())
            scene.put(first, 0.5 * jitter[2], 0.5 * jitter[3], self.between(0.25, 0.33), self.tilt())
        else:
            along = how == "left of"
            for thing, side, (a, b) in ((first, -1, jitter[:2]), (second, 1, jitter[2:])):
                x, y = (0.48 * side + 0.4 * a, b) if along else (b, 0.48 * side + 0.4 * a)
                scene.put(thing, x, y, self.between(0.34, 0.43), self.tilt())
        scene.text = f"{_a(first.words())} {how} {_a(second.words())} {scene.text}"
        return scene

    def three(self) -> Scene:
        """Three objects in a row."""
        scene = self.start()
        things: list[Thing] = []
        for index in range(3):
            things.append(self.thing(scene, unlike=things[-1].colour if things else ""))
            scene.put(things[-1], 0.64 * (index - 1), self.between(-0.2, 0.2), self.between(0.25, 0.3), self.tilt())
        scene.text = " and ".join(_a(t.words()) for t in things) + f" in a row {scene.text}"
        return scene

    def grid(self) -> Scene:
        """Equal objects in rows and columns, mostly blobs."""
        scene = self.start()
        count = (4, 6, 9)[int(self.chance.random() * 3)]
        across, down = {4: (2, 2), 6: (3, 2), 9: (3, 3)}[count]
        thing, size, angle = self.thing(scene, blobs=0.7), self.between(0.78, 0.95) / max(across, down), self.tilt()
        for index in range(count):
            x, y = index % across, index // across
            scene.put(thing, (2 * x + 1) / across - 1, (2 * y + 1) / down - 1, size, angle)
        scene.text = f"{NUMBERS[count]} equal {thing.words(many=True)} {scene.text}"
        return scene

    def wreath(self) -> Scene:
        """Equal objects around another one."""
        scene = self.start()
        count = (6, 8)[int(self.chance.random() * 2)]
        outer = self.thing(scene, blobs=0.4)
        inner = self.thing(scene, unlike=outer.colour)
        size, start = {6: 0.25, 8: 0.21}[count], self.between(0, 2 * math.pi)
        for index in range(count):
            angle = start + 2 * math.pi * index / count
            scene.put(outer, 0.66 * math.cos(angle), 0.66 * math.sin(angle), size, angle + math.pi / 2)
        scene.put(inner, 0.0, 0.0, self.between(0.26, 0.34), self.tilt())
        scene.text = f"a wreath of {NUMBERS[count]} {outer.words(many=True)} around {_a(inner.words())} {scene.text}"
        return scene

    def pattern(self) -> Scene:
        """Two objects that alternate over the whole picture."""
        scene = self.start()
        first = self.thing(scene, blobs=0.4)
        second = self.thing(scene, blobs=0.4, unlike=first.colour)
        scene.period, scene.turn = self.between(0.48, 0.75), self.between(-0.5, 0.5)
        x, y = self.between(0, scene.period), self.between(0, scene.period)
        scene.put(first, x, y, 0.3 * scene.period, self.tilt())
        scene.put(second, x + scene.period / 2, y + scene.period / 2, 0.3 * scene.period, self.tilt())
        scene.text = f"a pattern of {first.words(many=True)} and {second.words(many=True)} {scene.text}"
        return scene

    def kaleidoscope(self) -> Scene:
        """Objects of two colours, folded by mirrors."""
        scene = self.start()
        scene.fold = FOLDS[1 + int(self.chance.random() * 4)]
        scene.turn = 0.0 if scene.fold in ("mirror", "quarters") else self.between(0, math.pi)
        pair = [self.thing(scene, blobs=0.6)]
        pair.append(self.thing(scene, blobs=0.6, unlike=pair[0].colour))
        for index in range(6):
            angle, radius = self.between(0, 1.57), self.between(0.15, 1.1)
            y = radius * math.sin(angle) * (1 if scene.fold != "mirror" or index % 2 else -1)
            size = self.between(0.18, 0.34)
            scene.put(pair[index % 2], radius * math.cos(angle), y, size, self.between(0, 6.3))
        words = {"mirror": "a mirror image", "quarters": "four mirror images"}
        name = words.get(scene.fold, f"{_a(scene.fold)} sided kaleidoscope")
        scene.text = f"{name} of {pair[0].words(many=True)} and {pair[1].words(many=True)} {scene.text}"
        return scene


def vocabulary(sentences: int = 4000) -> list[str]:
    """Sentences that use every word of the grammar."""
    grammar = Grammar(0)
    return sorted({grammar.draw().text for _ in range(sentences)})
