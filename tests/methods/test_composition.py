"""Slots by keyword: any composition either runs or says which slots cannot go together."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from driving import VIDEO, make_run, one_step
from problems import CPU, HUNYUAN, qkv, run
from torch import Tensor
from torch.nn import functional as F

import dit_accel.presets as presets
from dit_accel.asked import choose
from dit_accel.choice import CHOICES
from dit_accel.compensate import COMPENSATIONS
from dit_accel.content import CONTENT_ORDERS
from dit_accel.method import Method
from dit_accel.order import ORDERS
from dit_accel.pattern import PATTERNS
from dit_accel.plan import Plan
from dit_accel.planner import Planner
from dit_accel.presets import get_method, load_methods, register_method
from dit_accel.score import SCORES
from dit_accel.selection import SELECTIONS
from dit_accel_kernels import dense_attention

#: Specs of slots whose values must be given.
_SPECS = {"learned": "learned:seer"}
_SLOTS: dict[str, list[Any]] = {
    "order": [*ORDERS.names(), *CONTENT_ORDERS.names(), "axes", ("fhw", "whf"), ("raster", "gilbert")],
    "order_choice": [*CHOICES.names(), None, None, None],
    "score": [_SPECS.get(name, name) for name in (*SCORES.names(), *PATTERNS.names())],
    "select": [*SELECTIONS.names(), None, None],
    "compensate": COMPENSATIONS.names(),
    "density": [0.3, 1.0, None],
    "block_k": [32, 64],
    "reuse": [None, None, "every:2", "similar:0.9", "leaders:0"],
}
_NAMED = re.compile("|".join([*_SLOTS, "selection", "orders?", "pattern", "window", "clusters", "density"]))
_COUNT, _CHUNK = 240, 20


def _composition(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    chosen = {slot: draw.choice(values) for slot, values in _SLOTS.items()}
    # Scores and patterns are drawn from one list; half of all draws are made to be more than their first error.
    if draw.random() < 0.6:
        chosen["order_choice"] = None
        if chosen["score"] in PATTERNS:
            chosen["select"] = chosen["reuse"] = None
        elif SCORES.trait(chosen["score"], "gathers", False):
            chosen["select"], chosen["compensate"] = "insisted", "drop"
    return {slot: value for slot, value in chosen.items() if value is not None}


def _plan(slots: dict[str, Any], tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Method, Plan]:
    method = choose(None, dict(slots))
    planner = Planner(method)
    out, lse = dense_attention(*tensors)
    ctx = planner.context(*tensors, lse, HUNYUAN, density=method.density_at(0), scale=None)
    ctx.dense_out = out
    plan = planner.plan(ctx) if method.plans_from_data else planner.pattern_plan(HUNYUAN, CPU, ctx.density, 2)
    return method, plan


def _check(slots: dict[str, Any]) -> bool:
    """Whether the composition runs; that it says why where it does not."""
    tensors = qkv(HUNYUAN, 3)
    said = None
    try:
        method, plan = _plan(slots, tensors)
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert _NAMED.search(said), f"{slots}: the message names no slot: {said}"
        return False
    rows = torch.arange(HUNYUAN.tokens) // method.block_q
    cols = torch.arange(HUNYUAN.tokens) // method.block_k
    text = torch.ones(HUNYUAN.tokens, dtype=torch.bool)
    text[HUNYUAN.visual_slice] = False
    for part in plan.parts or (plan,):
        levels = part.mask.levels()
        assert (levels > 0).any(-1).all(), f"{slots}: an empty row"
        assert (levels[..., cols[text].unique()] > 0).all(), f"{slots}: text keys must be seen"
        assert (levels[..., rows[text].unique(), :] > 0).all(), f"{slots}: text queries must see everything"
        torch.testing.assert_close(part.density, part.mask.density())
    found = run(plan, tensors)
    assert torch.isfinite(found).all(), slots
    whole = method.is_dense or (method.density == 1.0 and method.keeps_density and not method.is_geometric)
    if whole or method.compensate == "residual":
        dense = F.scaled_dot_product_attention(*tensors)
        torch.testing.assert_close(found, dense, atol=3e-4, rtol=1e-3, msg=lambda m: f"{slots}: {m}")
    return True


@pytest.mark.parametrize("chunk", range(_COUNT // _CHUNK))
def test_any_composition_runs_or_says_why(chunk: int) -> None:
    ran = [_check(_composition(seed)) for seed in range(chunk * _CHUNK, (chunk + 1) * _CHUNK)]
    assert any(ran), "none of these runs"


def test_the_draws_reach_every_slot() -> None:
    drawn = [_composition(seed) for seed in range(_COUNT)]
    for slot, values in _SLOTS.items():
        missing = {v for v in values if v is not None} - {d.get(slot) for d in drawn}
        assert not missing, f"{slot} was never {missing}"


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"score": "window", "select": "top_k"}, "select='top_k' cannot go with score='window'"),
        ({"score": "window", "select": "top_p:0.9"}, "select='top_p:0.9' cannot go with score='window'"),
        ({"score": "window", "order": "kmeans"}, "order 'kmeans' depends on the tokens"),
        ({"score": "window", "order": "axes", "order_choice": "recall"}, "order_choice 'recall' needs scores"),
        ({"score": "window", "compensate": "mean"}, "compensate='mean' cannot go with score='window'"),
        ({"score": "window", "reuse": "every:2"}, r"reuse=\('every:2',\) cannot go with score='window'"),
        ({"score": "stripes", "select": "levels_rank"}, "score 'stripes' gathers keys itself"),
        ({"score": "hierarchical", "select": "top_k"}, "select='top_k' cannot go with score='hierarchical'"),
        ({"score": "stripes", "compensate": "mean", "select": "insisted"}, "score 'stripes' gathers keys itself"),
        ({"score": "cluster", "order": "gilbert"}, "score 'cluster' goes with order 'kmeans'"),
        ({"order": ("raster", "gilbert"), "order_choice": "fixed"}, "several orders need order_choice"),
        ({"order": "kmeans", "static": True}, "order 'kmeans' depends on the tokens"),
        ({"score": "mean_pool", "order": "axes", "order_choice": "mse"}, "order_choice='mse' goes with a pattern"),
        ({"score": "none"}, "score 'none' goes with select"),
        ({"score": "mean_pol"}, "did you mean 'mean_pool'"),
        ({"score": "windows"}, "score must be one of .*got 'windows'.*patterns are .*, window"),
        ({"score": "mean_pool", "select": "top_q"}, "select must be one of"),
        ({"score": "mean_pool", "densty": 0.2}, "unknown option 'densty'"),
    ],
)
def test_slots_that_cannot_go_together(slots: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose(None, slots)


def test_a_composition_by_keyword_is_what_it_says() -> None:
    method = choose(None, {"order": "gilbert", "score": "antidiagonal:8", "select": "top_p:0.9", "compensate": "mean"})
    assert (method.name, method.order, method.density) == ("custom", ("gilbert",), None)
    assert choose(None, {"order": "axes", "score": "mass"}).order_choice == "recall"
    assert choose(None, {"order": "axes", "score": "band"}).order_choice == "mse"
    assert choose(None, {"score": "mean_pool"}).density == 0.25
    assert choose(None, {"density": 0.3}).name == "auto"
    with pytest.raises(ValueError, match="select='top_k' cannot go with score='window'"):
        choose("gna", {"select": "top_k"})


def test_presets_are_compositions() -> None:
    """Each preset says the same as its slots by keyword."""
    for method in load_methods().values():
        fields = {k: v for k, v in method.to_dict().items() if k not in ("name", "summary", "paper", "version")}
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if method.is_geometric:
            del fields["select"]
        again = choose(None, fields)
        assert again.replace(name=method.name, summary=method.summary, paper=method.paper) == method


# -- methods of third parties ---------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_registered", {})


@pytest.mark.usefixtures("registered")
def test_a_registered_method_is_known_by_its_name() -> None:
    mine = Method(name="mine", score="mean_pool", select="top_p:0.8", warmup=0.0)
    assert register_method(mine) is mine
    assert get_method("mine") is mine
    assert register_method(mine.replace()) == mine
    assert list(load_methods())[-1] == "mine"
    driven = make_run("mine", 1)
    one_step(driven, 0, 2)
    assert driven.status().sparse_calls == 1
    assert driven.ledger.plans[0].step == 0
    assert VIDEO.tokens == 495


@pytest.mark.usefixtures("registered")
def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="another method 'auto' ships with dit_accel"):
        register_method(Method(name="auto", score="mean_pool"))
    register_method(Method(name="mine", score="mean_pool"))
    with pytest.raises(ValueError, match="another method 'mine' is registered already"):
        register_method(Method(name="mine", score="mass"))
    with pytest.raises(TypeError, match="takes a Method, got str"):
        register_method("auto")  # type: ignore[arg-type]
