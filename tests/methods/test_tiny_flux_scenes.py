"""The scenes that the tiny FLUX is trained on: what the sentence says is in the picture, far parts agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

TRAINING = Path(__file__).resolve().parents[2] / "examples/tiny_flux_training"
SIZE = 48


@pytest.fixture(scope="module")
def kit() -> Any:
    """The modules, without leaving their folder on the path, where other examples have modules of the same names."""
    sys.path.insert(0, str(TRAINING))
    try:
        import outlines
        import paint
        import scenes
    finally:
        sys.path.remove(str(TRAINING))
    return type("Kit", (), {"outlines": outlines, "paint": paint, "scenes": scenes})


def _painted(kit: Any, scenes: list[Any], size: int = SIZE) -> Tensor:
    return kit.paint.paint(scenes, size, torch.device("cpu"))


def test_a_seed_gives_the_same_scenes(kit: Any) -> None:
    first, second, other = (kit.scenes.Grammar(seed) for seed in (3, 3, 4))
    one, two, three = ([g.draw() for _ in range(12)] for g in (first, second, other))
    assert [s.text for s in one] == [s.text for s in two] != [s.text for s in three]
    assert torch.equal(_painted(kit, one), _painted(kit, two))


def test_pictures_are_in_range_and_full(kit: Any) -> None:
    grammar = kit.scenes.Grammar(0)
    found = _painted(kit, [grammar.draw() for _ in range(24)])
    assert found.shape == (24, 3, SIZE, SIZE)
    assert float(found.min()) >= -1
    assert float(found.max()) <= 1
    assert float(found.flatten(1).std(1).min()) > 0.03


def test_a_picture_does_not_depend_on_its_batch(kit: Any) -> None:
    grammar = kit.scenes.Grammar(1)
    scenes = [grammar.draw() for _ in range(8)]
    together = _painted(kit, scenes)
    assert torch.allclose(together[5], _painted(kit, scenes[5:6])[0], atol=1e-5)


def test_mirrors(kit: Any) -> None:
    grammar, folds = kit.scenes.Grammar(2), {}
    while len(folds) < 4:
        scene = grammar.kaleidoscope()
        folds.setdefault(scene.fold, scene)
    mirror, quarters = _painted(kit, [folds["mirror"], folds["quarters"]])
    assert torch.allclose(mirror, mirror.flip(-1), atol=1e-4)
    assert torch.allclose(quarters, quarters.flip(-2).flip(-1), atol=1e-4)
    eight = _painted(kit, [folds["eight"]])[0]
    assert float((eight - eight.rot90(1, (-2, -1))).abs().mean()) < 0.02  # pixels at edges differ


def test_equal_blobs_are_equal(kit: Any) -> None:
    grammar = kit.scenes.Grammar(5)
    scene = grammar.grid()
    while len(scene.things) != 4 or scene.things[0][0].shape != "blob" or scene.back["texture"] != "plain":
        scene = grammar.grid()
    a, b = _painted(kit, [scene])[0].chunk(2, -1)
    assert torch.allclose(a, b, atol=0.02)
    assert torch.allclose(a[:, : SIZE // 2], a[:, SIZE // 2 :], atol=0.02)


def test_the_named_colour_is_there(kit: Any) -> None:
    grammar = kit.scenes.Grammar(7)
    scenes = [grammar.one() for _ in range(40)]
    scenes = [s for s in scenes if ("large" in s.text and s.things[0][0].shape == "circle") or "square" in s.text]
    scenes = [s for s in scenes if s.things[0][0].texture == "plain"]
    assert scenes
    for scene, picture in zip(scenes, _painted(kit, scenes), strict=True):
        thing, x, y, _, _ = scene.things[0]
        column, row = (int((c + 1) / 2 * SIZE) for c in (x, y))
        wanted = torch.tensor(kit.scenes.PALETTE[thing.colour]) * 2 - 1
        assert torch.allclose(picture[:, row, column].float(), wanted.float(), atol=0.05), scene.text


def test_outlines_are_whole(kit: Any) -> None:
    for name, outline in kit.outlines.OUTLINES.items():
        assert outline.shape == (256,), name
        assert outline.max() == pytest.approx(1), name
        assert outline.min() > 0.2, name
    drawn = [kit.outlines.blob(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
