"""Every pair of registered slots on a tiny random model: it runs, or ``enable`` says which slots cannot go together."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.compensate import COMPENSATIONS
from dit_accel.content import CONTENT_ORDERS
from dit_accel.order import AXIS_ORDERS, ORDERS
from dit_accel.pattern import PATTERNS
from dit_accel.score import SCORES
from dit_accel.selection import SELECTIONS

diffusers = pytest.importorskip("diffusers")

#: Specs of slots whose values must be given; conftest.py registers the scorer.
_SPECS = {"learned": "learned:seer"}
SLOTS: dict[str, list[str]] = {
    "order": [*ORDERS.names(), *CONTENT_ORDERS.names(), "axes"],
    "score": [_SPECS.get(name, name) for name in (*SCORES.names(), *PATTERNS.names())],
    "select": SELECTIONS.names(),
    "compensate": COMPENSATIONS.names(),
}
#: What the slots that are not looked at hold; where a score needs another partner, it gets that one.
NEUTRAL = {"order": "raster", "score": "mean_pool", "select": "top_k", "compensate": "drop"}
OPTIONS = {"min_tokens": 0, "warmup": 0.0, "density": 0.4, "block_q": 32, "block_k": 32}
#: Draws of all four slots at once, beyond the pairs.
_DRAWS = 150


def _is_pattern(score: str) -> bool:
    return score.partition(":")[0] in PATTERNS


def _compose(given: dict[str, str]) -> dict[str, str]:
    slots = {**NEUTRAL, **given}
    if _is_pattern(slots["score"]):
        return slots if "select" in given else {slot: slots[slot] for slot in slots if slot != "select"}
    if "select" not in given and SCORES.trait(slots["score"], "gathers", False):
        slots["select"] = "insisted"
    if "select" not in given and slots["score"] == "none":
        slots["select"] = "all"
    if "order" not in given and SCORES.trait(slots["score"], "clusters", False):
        slots["order"] = "kmeans"
    return slots


def _pairs(one: str, other: str) -> Iterator[dict[str, str]]:
    """All pairs of values; of the six permutations of the axes, which are one rule, two stand for all."""
    kept = {**SLOTS, "order": [name for name in SLOTS["order"] if name not in AXIS_ORDERS[2:]]}
    for values in itertools.product(kept[one], kept[other]):
        yield _compose(dict(zip((one, other), values, strict=True)))


def _draws() -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    for _ in range(_DRAWS):
        slots = {slot: draw.choice(values) for slot, values in SLOTS.items()}
        if _is_pattern(slots["score"]):
            del slots["select"]
        yield slots


class _Model:
    """One layer of Wan with 256 tokens, and what it gives without us."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer: Any = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=64,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        ).eval()
        self.latents, self.text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 16, 32)
        self.dense = self.forward(500.0)

    @torch.no_grad()
    def forward(self, time: float) -> Tensor:
        found = self.transformer(
            self.latents, timestep=torch.tensor([time]), encoder_hidden_states=self.text, return_dict=False
        )[0]
        assert isinstance(found, Tensor)
        return found


@pytest.fixture(scope="module")
def model() -> _Model:
    return _Model()


def _outcome(model: _Model, slots: dict[str, str]) -> str:
    """``"ran"``, ``"dense"`` for a method that keeps every block, or ``"refused"`` with a reason that names a slot."""
    options: dict[str, Any] = {**OPTIONS, **slots}
    try:
        with dit_accel.enabled(model.transformer, **options) as handle:
            made = [model.forward(time) for time in (900.0, 500.0)]
            (status,) = handle.stats().values()
    except ValueError as error:
        said = str(error)
        told = [slot for slot, value in slots.items() if slot in said or value in said]
        assert told, f"{slots}: the message names no slot: {said}"
        return "refused"
    assert all(torch.isfinite(x).all() for x in made), slots
    if not status.sparse_calls:
        assert slots.get("select") == "all", f"{slots}: dense throughout: {status.reasons}"
        torch.testing.assert_close(made[1], model.dense)
        return "dense"
    assert 0 < status.sparse_density <= 1, slots
    return "ran"


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SLOTS, 2)))
def test_every_pair_runs_or_says_why(model: _Model, one: str, other: str) -> None:
    seen = Counter(_outcome(model, slots) for slots in _pairs(one, other))
    assert seen["ran"] > seen["refused"] or {one, other} == {"score", "select"}, seen
    assert seen["ran"], seen
    assert torch.equal(model.forward(500.0), model.dense)  # gone without a trace


def test_draws_of_all_slots_run_or_say_why(model: _Model) -> None:
    seen = Counter(_outcome(model, slots) for slots in _draws())
    assert seen["ran"] > _DRAWS // 4, seen
    assert seen["refused"], seen


def test_every_value_runs_with_some_partner(model: _Model) -> None:
    """No slot's value is refused by everything."""
    for slot, values in SLOTS.items():
        for value in values:
            assert _outcome(model, _compose({slot: value})) in ("ran", "dense"), f"{slot}={value}"
