"""Vertical lines and slashes: planted ones are found, scores follow their definition."""

from __future__ import annotations

import pytest
import torch

from dit_accel.choice.mse import sampled_queries
from dit_accel.geometry import TokenGeometry
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel.score import block_scores
from dit_accel.score.vertical_slash import line_scores, sampled_mass

CPU = torch.device("cpu")
GEOMETRY = TokenGeometry((4, 16, 16), prefix=30)


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 32), (32, 64)])
def test_line_scores_equal_loops(block_q: int, block_k: int) -> None:
    tokens = 520
    columns, rows = -(-tokens // block_k), -(-tokens // block_q)
    gen = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 2, 9, columns, generator=gen)
    sampled = (torch.arange(9) * 57 + 5) // block_k
    found = line_scores(mass, sampled, rows, block_q, block_k)
    for head in range(2):
        for i in range(rows):
            for j in range(columns):
                best = float(mass[0, head, :, j].mean())
                own = {min(t // block_k, columns - 1) for t in range(i * block_q, (i + 1) * block_q)}
                for place in own:
                    met = [r for r in range(9) if 0 <= int(sampled[r]) + j - place < columns]
                    values = [float(mass[0, head, r, int(sampled[r]) + j - place]) for r in met]
                    best = max(best, sum(values) / len(values) if values else 0.0)
                assert float(found[0, head, i, j]) == pytest.approx(best, abs=1e-5)


def test_sampled_mass_is_the_softmax_map() -> None:
    gen = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 2, GEOMETRY.tokens, 16, generator=gen) for _ in range(2))
    valid = torch.ones(2, GEOMETRY.tokens, dtype=torch.bool)
    valid[1, :9] = False
    planner = Planner(get_method("vertical_slash"))
    ctx = planner.context(q, k, None, None, GEOMETRY, density=0.3, scale=0.5, key_valid=valid)
    rows = sampled_queries(GEOMETRY, CPU)
    found = sampled_mass(ctx, rows)
    logits = (q @ k.mT * 0.5).masked_fill(~valid[:, None, None], -torch.inf)
    probs = logits.softmax(-1)[:, :, rows]
    for j in range(found.shape[-1]):
        torch.testing.assert_close(found[..., j], probs[..., j * 64 : (j + 1) * 64].sum(-1), atol=1e-5, rtol=1e-4)
    block_scores(ctx)
    assert ctx.cost == pytest.approx(0.5 * 64 / GEOMETRY.tokens)


def test_planted_lines_are_found_head_by_head() -> None:
    """Head 0 attends one frame away (a slash), head 1 to the tokens of one block (a vertical line)."""
    geometry = TokenGeometry((8, 8, 16))  # a frame is two blocks
    tokens = geometry.tokens
    angle = torch.arange(tokens).float() * (2 * torch.pi / tokens)
    waves = torch.arange(1, 33).float() * angle[:, None]
    key = torch.cat([waves.cos(), waves.sin()], -1)
    slash = key.roll(-128, 0)
    vertical = torch.zeros(tokens, 64)
    vertical[:, 0] = 6.0
    hot = torch.zeros(tokens, 64)
    hot[5 * 64 : 6 * 64, 0] = 6.0
    q, k = torch.stack((4 * slash, vertical))[None], torch.stack((key, hot))[None]
    planner = Planner(get_method("vertical_slash"))
    plan = planner.plan(planner.context(q, k, k, None, geometry, density=0.22, scale=None))
    levels = plan.mask.levels()[0] > 0
    blocks = levels.shape[-1]
    row = torch.arange(blocks)
    assert bool(levels[:, row, row].all())
    assert bool(levels[0, row[:-2], row[2:]].all())
    assert bool(levels[1, :, 5].all())
    assert not bool(levels[0, :, 5].all())
    assert plan.density.mean().item() == pytest.approx(0.22, abs=0.03)
