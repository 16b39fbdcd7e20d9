"""DHSA: chunks cut where keys change, means scaled by the root of their length, upsampled."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.score.chunks import chunk_ids
from tests.methods._scored import SMALL, inputs, scores

BLOCK = 16


def test_scores_are_upsampled_products_of_scaled_means() -> None:
    q, k, v = inputs(SMALL)
    got = scores("dhsa", q, k, v, SMALL, score="chunks:length=20,window=6", block_q=BLOCK, block_k=BLOCK).values
    tokens, dim = q.shape[2:]
    ids = chunk_ids(k, -(-tokens // 20), 6)
    for head in range(3):
        chunk = ids[0, head].tolist()
        members = [[t for t in range(tokens) if chunk[t] == c] for c in range(max(chunk) + 1)]
        q_c, k_c = (torch.stack([x[0, head, m].mean(0) * math.sqrt(len(m)) for m in members]) for x in (q, k))
        similar = q_c @ k_c.T / math.sqrt(dim)
        by_token = similar[chunk][:, chunk]
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                want = by_token[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].mean()
                assert float(got[0, head, i, j]) == pytest.approx(float(want), abs=1e-4, rel=1e-5)


def test_chunks_are_cut_where_keys_change() -> None:
    """Planted runs of unequal length, with noise: their borders are found."""
    lengths = [50, 20, 90, 33, 67]
    gen = torch.Generator().manual_seed(3)
    runs = [torch.randn(1, 32, generator=gen).expand(n, -1) for n in lengths]
    keys = (torch.cat(runs) + 0.2 * torch.randn(sum(lengths), 32, generator=gen))[None, None]
    ids = chunk_ids(keys, 5, 8)[0, 0]
    assert ids[0] == 0
    assert set(ids.diff().tolist()) == {0, 1}
    borders = (ids.diff().nonzero()[:, 0] + 1).tolist()
    assert borders == torch.tensor(lengths).cumsum(0)[:-1].tolist()


@pytest.mark.parametrize(("tokens", "count", "window"), [(7, 3, 16), (40, 1, 4), (40, 40, 1), (65, 9, 5)])
def test_there_are_at_most_so_many_chunks(tokens: int, count: int, window: int) -> None:
    keys = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    ids = chunk_ids(keys, count, window)
    assert ids.min() == 0
    assert ids.max() < count
    assert (ids.diff(dim=-1) >= 0).all()


def test_bad_sizes_are_refused() -> None:
    q, k, v = inputs(SMALL)
    with pytest.raises(ValueError, match="at least 1 token, got length=0"):
        scores("dhsa", q, k, v, SMALL, score="chunks:length=0")
