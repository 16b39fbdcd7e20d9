"""VMoBA, BiFormer's regions and DraftAttention: means of chunks, regions and patches, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.order import order_index
from dit_accel.presets import get_method
from tests.methods._scored import FLUX, HUNYUAN, context, inputs, plan, scores


def _means(x: Tensor, index: Tensor | None, block: int) -> Tensor:
    """Means of blocks of one head ``[S, D]`` in an order."""
    x = x if index is None else x[index.long()]
    return torch.stack([x[s : s + block].mean(0) for s in range(0, len(x), block)])


def test_vmoba_keeps_a_quarter_of_the_gates_of_a_head() -> None:
    q, k, v = inputs(HUNYUAN)
    method = get_method("vmoba")
    ctx = context(method, q, k, v, HUNYUAN)
    for layer, name in enumerate(method.order):
        levels = plan(method, q, k, v, HUNYUAN, layer=layer).mask.levels()
        index = order_index(name, HUNYUAN)
        for head in range(3):
            gates = _means(q[0, head], index, 64) @ _means(k[0, head], index, 64).T / math.sqrt(32)
            shares = (gates - gates.min()) / (gates.max() - gates.min())
            kept = torch.zeros(gates.numel(), dtype=torch.bool)
            total = 0.0
            for place in shares.flatten().argsort(descending=True).tolist():
                if total >= 0.25 * float(shares.sum()):
                    break
                kept[place] = True
                total += float(shares.flatten()[place])
            kept = kept.view(gates.shape) | torch.eye(len(gates), dtype=torch.bool)
            kept[torch.arange(len(gates)), gates.argmax(-1)] = True  # ours: a rule leaves no row empty
            kept |= ctx.forced.cols | ctx.forced.rows[:, None]
            assert torch.equal(levels[0, head] > 0, kept), name


def test_vmoba_layers_take_turns() -> None:
    q, k, v = inputs(HUNYUAN)
    method = get_method("vmoba")
    for layer in range(6):
        made = plan(method, q, k, v, HUNYUAN, layer=layer)
        assert made.order is not None
        index = order_index(method.order[layer % 3], HUNYUAN)
        want = torch.arange(HUNYUAN.tokens) if index is None else index.long()
        assert torch.equal(made.order.table[made.order.head[0]].long(), want)


def test_vmoba_chunks_in_two_dimensions_hold_all_frames() -> None:
    geometry = TokenGeometry((16, 8, 12))
    index = order_index(get_method("vmoba").order[1], geometry)
    assert index is not None
    for block in index.view(-1, 64):
        frames, rows, cols = block // 96, block // 12 % 8, block % 12
        assert len(set(frames.tolist())) == 16
        assert int(rows.max() - rows.min()) == int(cols.max() - cols.min()) == 1


def test_own_chunk_is_kept_with_unequal_blocks() -> None:
    q, k, v = inputs(HUNYUAN)
    got = scores("vmoba", q, k, v, HUNYUAN, block_q=64, block_k=32)
    assert got.insist is not None
    for i in range(got.insist.shape[2]):
        own = [j for j in range(got.insist.shape[3]) if j * 32 < (i + 1) * 64 and (j + 1) * 32 > i * 64]
        assert got.insist[0, 0, i].nonzero()[:, 0].tolist() == own


def test_a_budget_of_the_head_goes_to_hard_rows() -> None:
    q, k, v = inputs(HUNYUAN)
    levels = plan(get_method("vmoba").replace(density=0.3), q, k, v, HUNYUAN).mask.levels()[0, 0, :-2]
    counts = levels.sum(-1)
    assert counts.max() > counts.min()


@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN], ids=str)
def test_bra_routes_by_the_sum_over_heads(geometry: TokenGeometry) -> None:
    q, k, v = inputs(geometry)
    method = get_method("bra").replace(density=0.2)
    ctx = context(method, q, k, v, geometry)
    made = plan(method, q, k, v, geometry)
    levels = made.mask.levels()
    assert levels.shape[:2] == (1, 1)
    index = order_index("brick:1x8x8", geometry)
    joined_q, joined_k = (torch.cat([_means(x[0, h], index, 64) for h in range(3)], 1) for x in (q, k))
    affinity = (joined_q @ joined_k.T).masked_fill(ctx.forced.cols, math.inf)
    kept = torch.zeros_like(affinity, dtype=torch.bool)
    for i, row in enumerate(affinity):
        kept[i, row.argsort(descending=True)[: round(0.2 * len(row))]] = True
    kept |= ctx.forced.cols | ctx.forced.rows[:, None]
    assert torch.equal(levels[0, 0] > 0, kept)


def test_draft_takes_a_percentile_of_each_head() -> None:
    geometry = TokenGeometry((2, 16, 32), suffix=20)
    q, k, v = inputs(geometry)
    method = get_method("draft").replace(density=0.3)
    ctx = context(method, q, k, v, geometry)
    levels = plan(method, q, k, v, geometry).mask.levels()
    for head in range(3):
        patches = []
        for x in (q[0, head], k[0, head]):
            video = x[: geometry.visual].view(2, 2, 8, 2, 16, -1)  # frames, rows and columns of patches of 8 x 16
            means = video.mean((2, 4)).reshape(8, -1)
            patches.append(torch.cat((means, x[geometry.visual :].mean(0)[None])))
        logits = patches[0] @ patches[1].T / math.sqrt(32)
        share = (logits + torch.tensor([128.0] * 8 + [20.0]).log()).softmax(-1).masked_fill(ctx.forced.cols, math.inf)
        kept = torch.zeros(81, dtype=torch.bool)
        kept[share.flatten().argsort(descending=True)[: round(0.3 * 81)]] = True
        kept = kept.view(9, 9)
        kept[torch.arange(9), share.argmax(-1)] = True  # where a percentile leaves a row empty, its best patch stays
        kept |= ctx.forced.cols | ctx.forced.rows[:, None]
        assert torch.equal(levels[0, head] > 0, kept)
