"""Attention metrics and map pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_accel_eval.attention import cosine, recalled_mass, relative_l1, rmse
from dit_accel_eval.maps import HeadMaps, draw_maps, evenly_ranked


def test_numbers() -> None:
    reference = torch.tensor([3.0, -4.0])
    output = torch.tensor([3.0, -2.0])
    assert relative_l1(output, reference) == pytest.approx(2 / 7)
    assert cosine(output, reference) == pytest.approx(17 / (5 * 13**0.5))
    assert rmse(output, reference) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="one shape"):
        rmse(output, reference[:1])


def heads() -> list[HeadMaps]:
    found = []
    for head in range(5):
        mass = (torch.randn(12, 12) * head).softmax(-1)
        kept = torch.zeros(12, 12, dtype=torch.bool).scatter_(-1, mass.topk(3).indices, True)
        found.append(HeadMaps(0, head, "hwf", mass.flip(0), mass, kept))
    return found


def test_recalled_mass() -> None:
    one = heads()[3]
    assert one.recall == pytest.approx(float(one.ordered.topk(3).values.sum(-1).mean()), abs=1e-6)
    assert one.raster_recall == pytest.approx(one.recall, abs=1e-6)  # the same rows in another order
    assert one.density == pytest.approx(0.25)
    both = recalled_mass(torch.stack([one.ordered] * 2), one.kept)
    assert both.shape == (2,)
    with pytest.raises(ValueError, match="one map size"):
        recalled_mass(one.ordered, one.kept[:3])


def test_pictures_show_the_worst_head_too(tmp_path: Path) -> None:
    ranked = evenly_ranked(heads(), 3)
    assert len(ranked) == 3
    assert ranked[0].recall == max(h.recall for h in ranked)
    draw_maps(tmp_path / "maps.png", ranked, "title")
    with Image.open(tmp_path / "maps.png") as image:
        assert image.width > 900
        assert len(image.convert("RGB").resize((60, 60)).getcolors(3600)) > 20
    with pytest.raises(ValueError, match="at least one head"):
        draw_maps(tmp_path / "none.png", [])
