"""Key sort (arXiv 2510.21270) and k-means (arXiv 2505.18875, 2003.05997) against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FLUX, HUNYUAN, VIDEO, context, make_plan, qkv, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.content import CONTENT_ORDERS
from dit_accel.content.kmeans import MEMORY, Clusters, lloyd


def _is_order(table: Tensor, visual: slice) -> None:
    tokens = table.shape[1]
    count = visual.stop - visual.start
    for row in table:
        assert sorted(row.tolist()) == list(range(tokens))
        assert sorted(row[:count].tolist()) == list(range(visual.start, visual.stop))


def test_keys_are_sorted_by_popularity() -> None:
    tensors = qkv(FLUX)
    _, ctx = context("pbs", FLUX, tensors)
    order = CONTENT_ORDERS.create("key_sort:32", ctx)
    assert order.query is None
    assert order.key is not None
    _is_order(order.key.table, FLUX.visual_slice)
    q, k = tensors[0][0].double(), tensors[1][0].double()
    places = [int((i + 0.5) * FLUX.tokens / 32) for i in range(32)]
    for head in range(2):
        popular = (q[head, places] @ k[head].T * 32**-0.5).softmax(-1).mean(0)
        ranked = popular[order.key.table[head, : FLUX.visual].long()]
        assert (ranked[:-1] >= ranked[1:] - 1e-9).all()


def test_lloyd_assigns_and_averages() -> None:
    gen = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 8, generator=gen) * 6
    x = (centres[torch.arange(200) % 5] + torch.randn(200, 8, generator=gen) * 0.1)[None]
    found, label = lloyd(x, x[:, :5], 4)
    for cluster in range(5):
        members = x[0][label[0] == cluster]
        torch.testing.assert_close(found[0, cluster], members.mean(0), atol=1e-4, rtol=1e-4)
    assert len({tuple(label[0, i::5].tolist()) for i in range(5)}) == 5  # each planted cluster is one
    nearest = torch.cdist(x[0], found[0]).argmin(-1)
    assert torch.equal(nearest, label[0])


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x = torch.zeros(1, 10, 3)
    far = torch.full((1, 1, 3), 50.0)
    found, label = lloyd(x, torch.cat((torch.ones(1, 1, 3), far), 1), 3)
    assert torch.equal(found[0, 1], far[0, 0])
    assert (label == 0).all()


@pytest.mark.parametrize("name", ["svg2", "routing"])
def test_later_plans_begin_with_the_centroids_of_the_last(name: str) -> None:
    planner, ctx = context(name, VIDEO, qkv(VIDEO), density=0.3)
    planner.plan(ctx)
    first = ctx.memory["batch"][MEMORY]
    assert isinstance(first, Clusters)
    cost = ctx.cost
    ctx.cost = 0.0
    plan = planner.plan(ctx)
    assert ctx.cost < 0.3 * cost
    assert plan.parts[0].order is not None
    _is_order(plan.parts[0].order.table, VIDEO.visual_slice)


def test_svg2_keeps_every_pair_that_the_paper_keeps() -> None:
    """Top-p of 0.9 over size-weighted clusters, at least a tenth of them; each kept pair lies in kept blocks."""
    tensors = qkv(VIDEO, seed=7, gain=3.0)
    planner, ctx = context("svg2", VIDEO, tensors, order="kmeans:6,12")
    plan = planner.plan(ctx)
    part, found = plan.parts[0], ctx.memory["batch"][MEMORY]
    levels = part.mask.levels()[0]
    assert part.order is not None
    assert part.key_order is not None
    wanted = torch.zeros_like(levels)
    for head in range(2):
        size = torch.bincount(found.key_label[head], minlength=12).double()
        logits = found.query[head].double() @ found.key[head].double().T * 32**-0.5 + size.log()
        for a, mass in enumerate(logits.softmax(-1)):
            before, kept = 0.0, set()
            for rank, b in enumerate(mass.argsort(descending=True).tolist()):
                if before < 0.9 or rank < round(0.1 * 12):
                    kept.add(b)
                before += float(mass[b])
            rows = _blocks_of(part.order.table[head], found.query_label[head] == a)
            for b in kept:
                for i in rows:
                    for j in _blocks_of(part.key_order.table[head], found.key_label[head] == b):
                        wanted[head, i, j] = 1
    for head in range(2):  # the best block of a row is kept besides
        extra = (levels[head].bool() & ~wanted[head].bool()).sum()
        assert extra <= levels.shape[1]
        assert (levels[head][wanted[head].bool()] == 1).all()


def _blocks_of(table: Tensor, member: Tensor) -> set[int]:
    return {i // 64 for i, token in enumerate(table.tolist()) if member[token]}


def test_routing_stays_within_its_clusters() -> None:
    tensors = qkv(HUNYUAN, seed=8)
    planner, ctx = context("routing", HUNYUAN, tensors, order="routing:5")
    plan = planner.plan(ctx)
    part, found = plan.parts[0], ctx.memory["batch"][MEMORY]
    levels = part.mask.levels()[0]
    text = {HUNYUAN.visual // 64, (HUNYUAN.tokens - 1) // 64}
    assert part.order is not None
    assert part.key_order is not None
    for head in range(2):
        for i in range(levels.shape[1]):
            own = _clusters_in(part.order.table[head], found.query_label[head], i, HUNYUAN.visual)
            for j in range(levels.shape[2]):
                theirs = _clusters_in(part.key_order.table[head], found.key_label[head], j, HUNYUAN.visual)
                shared = bool(own & theirs) or i in text or j in text
                if shared or levels[head, i].sum() > 1 + len(text):
                    assert bool(levels[head, i, j]) == shared


def _clusters_in(table: Tensor, label: Tensor, block: int, visual: int) -> set[int]:
    tokens = table[block * 64 : block * 64 + 64].tolist()
    return {int(label[t]) for t in tokens if t < visual}


def test_batch_elements_have_their_own_orders() -> None:
    first, second = qkv(VIDEO, seed=9), qkv(VIDEO, seed=10)
    both = tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
    together = run(make_plan("pbs", VIDEO, both, density=0.3), both)  # type: ignore[arg-type]
    for i, alone in enumerate((first, second)):
        torch.testing.assert_close(together[i : i + 1], run(make_plan("pbs", VIDEO, alone, density=0.3), alone))


@pytest.mark.parametrize("density", [0.3, None])
@pytest.mark.parametrize("name", ["pbs", "svg2", "routing"])
def test_a_batch_is_planned_at_once_as_each_element_is_alone(name: str, density: float | None) -> None:
    """Over two plans, so that clusters are taken up again; and as the loop over elements that masked calls go through."""
    alone = [qkv(HUNYUAN, seed=seed) for seed in (1, 2, 3)]
    both = tuple(torch.cat(tensors) for tensors in zip(*alone, strict=True))
    planner, ctx = context(name, HUNYUAN, both, density=density)  # type: ignore[arg-type]
    _, masked = context(name, HUNYUAN, both, density=density)  # type: ignore[arg-type]
    masked.key_valid = torch.ones(3, HUNYUAN.tokens, dtype=torch.bool)
    for _ in range(2):
        together, looped = planner.plan(ctx), planner.plan(masked)
    assert together.cost == pytest.approx(looped.cost)
    for i, tensors in enumerate(alone):
        planner, one = context(name, HUNYUAN, tensors, density=density)
        for _ in range(2):
            plan = planner.plan(one)
        part = together.parts[i]
        for other in (plan.parts[0], looped.parts[i]):
            assert torch.equal(part.mask.levels(), other.mask.levels())
            assert part.key_order is not None
            assert other.key_order is not None
            assert torch.equal(part.key_order.table, other.key_order.table)
        torch.testing.assert_close(together.density[i : i + 1], plan.density)
        torch.testing.assert_close(part.mask.lists().full, plan.parts[0].mask.lists().full)


@pytest.mark.parametrize("name", ["pbs", "svg2", "routing"])
def test_planning_launches_no_more_kernels_for_a_larger_batch(name: str) -> None:
    counts = []
    for batch in (2, 6):
        tensors = tuple(x.repeat(batch, 1, 1, 1) for x in qkv(VIDEO))
        planner, ctx = context(name, VIDEO, tensors, density=0.3)  # type: ignore[arg-type]
        planner.plan(ctx)  # what the geometry decides is made once
        with _Operations() as seen:
            planner.plan(ctx)
        counts.append(seen.count)
    assert counts[1] == counts[0]


class _Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return found


def test_clusters_do_not_depend_on_how_much_fits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 200, 8, generator=torch.Generator().manual_seed(4))
    found, label = lloyd(x, x[:, :9], 3)
    monkeypatch.setattr("dit_accel.content.kmeans._CHUNK", 3 * 9 * 37)
    again, label_again = lloyd(x, x[:, :9], 3)
    torch.testing.assert_close(found, again)
    assert torch.equal(label, label_again)
