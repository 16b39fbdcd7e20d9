"""ProxyAttn: groups of like heads, the proxy's ranking and each head's own budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.presets import get_method
from dit_accel.score.mean_pool import mean_pool
from dit_accel.score.proxy import head_groups
from tests.methods._scored import HUNYUAN, SMALL, context, inputs, scores

BLOCK = 16


def _like_heads() -> tuple[Tensor, Tensor, Tensor]:
    """Heads 0 and 2 are alike, 1 and 4, and 3 is on its own."""
    first, second, third = (inputs(SMALL, seed=s, heads=1) for s in (11, 12, 13))
    noise = torch.Generator().manual_seed(1)
    parts = []
    for x, y, z in zip(first, second, third, strict=True):
        heads = torch.cat((x, y, x, z, y), 1)
        parts.append(heads + 0.05 * torch.randn(heads.shape, generator=noise))
    return parts[0], parts[1], parts[2]


def test_like_heads_share_a_group() -> None:
    q, k, v = _like_heads()
    method = get_method("proxy").replace(block_q=BLOCK, block_k=BLOCK)
    own = mean_pool(context(method, q, k, v, SMALL)).values
    which, member = head_groups(own, 3, 0.5)
    groups = which[0].tolist()
    assert groups[0] == groups[2]
    assert groups[1] == groups[4]
    assert len(set(groups)) == 3
    assert member.all()
    two, alike = head_groups(own, 1, 0.8)
    assert set(two[0].tolist()) == {0}
    assert 1 < int(alike.sum()) < 5  # the others are unlike the one leader


def test_overlap_is_an_intersection_over_a_union() -> None:
    """Two heads whose best blocks are known: 2 of 4 a row, one of them shared, so 1 / 3."""
    own = torch.zeros(1, 2, 3, 8)
    own[0, 0, :, [0, 1]] = 1.0
    own[0, 1, :, [1, 2]] = 1.0
    assert head_groups(own, 1, 0.33)[1].all()
    assert int(head_groups(own, 1, 0.34)[1].sum()) == 1


def test_ranking_is_the_proxys_and_values_are_the_heads() -> None:
    q, k, v = _like_heads()
    changes = {"block_q": BLOCK, "block_k": BLOCK, "score": "proxy:group=2,every=4"}
    method = get_method("proxy").replace(**changes)
    own = mean_pool(context(method, q, k, v, SMALL)).values
    got = scores("proxy", q, k, v, SMALL, **changes).values
    which, member = head_groups(own, 3, 0.5)
    tokens, dim = q.shape[2:]
    for head in range(5):
        mates = [h for h in range(5) if which[0, h] == which[0, head] and member[0, h]]
        mean_q, mean_k = q[0, mates].mean(0), k[0, mates].mean(0)
        share = (mean_q @ mean_k.T / math.sqrt(dim)).softmax(-1)
        for i in range(got.shape[2]):
            rows = share[i * BLOCK : (i + 1) * BLOCK : 4]
            proxy = torch.stack([rows[:, j : j + BLOCK].max() for j in range(0, tokens, BLOCK)])
            want = torch.empty_like(proxy)
            want[proxy.argsort(descending=True)] = own[0, head, i].sort(descending=True).values
            torch.testing.assert_close(got[0, head, i], want)


def test_a_head_like_no_other_keeps_its_own_ranking() -> None:
    q, k, v = inputs(HUNYUAN, heads=4)
    changes = {"score": "proxy:group=4,overlap=1.0"}
    own = mean_pool(context(get_method("proxy"), q, k, v, HUNYUAN)).values
    got = scores("proxy", q, k, v, HUNYUAN, **changes).values
    alone = ~head_groups(own, 1, 1.0)[1][0]
    assert alone.any()
    torch.testing.assert_close(got[0, alone], own[0, alone])


def test_bad_values_are_refused() -> None:
    q, k, v = inputs(SMALL)
    with pytest.raises(ValueError, match="every >= 1 that divides block_q=64"):
        scores("proxy", q, k, v, SMALL, score="proxy:every=3")
