"""How long plans live: every k steps, until queries turn, and by the layer that leads."""

from __future__ import annotations

import pytest
import torch
from driving import VIDEO, layer_tensors, make_run, one_step, plan_steps, sparse_steps

from dit_accel.adapter import StepInfo
from dit_accel.method import Method
from dit_accel.policy import Action, Policy
from dit_accel.presets import get_method
from dit_accel.reuse import parse_reuse
from dit_accel.runtime import ModelRun


def _go(run: ModelRun, steps: int, **options: object) -> None:
    for step in range(steps):
        one_step(run, step, steps, **options)  # type: ignore[arg-type]


# -- every:k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 4, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("score", ["mean_pool", "mass"])
def test_every_plans_again_after_so_many_steps(every: int, warmup: float, score: str) -> None:
    run = make_run(
        "union", 1, order=("raster",), order_choice="fixed", score=score, warmup=warmup, reuse=f"every:{every}"
    )
    _go(run, 10)
    first = 2 if warmup else 0
    first -= score == "mass" and warmup > 0  # from the log-sum-exp of the last warm-up step
    assert plan_steps(run)[0] == list(range(first, 10, every))


def test_every_and_shares_of_the_run_both_refresh() -> None:
    run = make_run("sol", 1, warmup=0.1, reuse="every:4", refresh=(0.3, 0.5))
    _go(run, 12)
    # every four steps from the latest plan, whichever rule made it, and at 0.3 * 12 and 0.5 * 12 besides
    assert plan_steps(run)[0] == [2, 4, 6, 10]


def test_every_needs_no_number_of_steps() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse="every:3")
    for step in range(7):
        one_step(run, step, None)
    assert plan_steps(run)[0] == [0, 3, 6]


def test_without_steps_a_plan_stays() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse="every:1")
    for _ in range(3):
        one_step(run, None, None)
    assert len(run.ledger.plans) == 1


def test_a_refresh_takes_the_log_sum_exp_of_the_first_plan() -> None:
    run = make_run("adaspa", 1, warmup=0.2, refresh=(), reuse="every:2")
    _go(run, 10)
    assert plan_steps(run)[0] == [1, 3, 5, 7, 9]
    assert [plan.cost for plan in run.ledger.plans] == [0.5] * 5  # never Q K^T a second time for the log-sum-exp


def test_an_interrupted_run_begins_anew() -> None:
    run = make_run("adaspa", 1, refresh=(), reuse="every:2", warmup=0.2)
    for step in range(5):
        one_step(run, step, 10)
    for step in range(3):  # the same run object, with no end of the run in between
        one_step(run, step, 10)
    assert plan_steps(run)[0] == [1, 3, 1]
    assert sparse_steps(run, 0) == [2, 3, 4, 2]


def test_a_step_that_comes_twice_keeps_its_plan() -> None:
    """Solvers of second order call the model twice at each step."""
    run = make_run("adaspa", 1, refresh=(), reuse="every:2", warmup=0.2)
    for step in (0, 0, 1, 2, 2, 3, 3, 4, 4):
        one_step(run, step, 10)
    assert plan_steps(run)[0] == [1, 3]


def test_recycled_plans_on_dense_steps() -> None:
    run = make_run("recycled", 1, warmup=0.1)
    _go(run, 20)
    assert plan_steps(run)[0] == [1, 6, 11, 16]
    assert sparse_steps(run, 0) == [s for s in range(2, 20) if s not in (6, 11, 16)]
    assert run.status().reasons == {"warm-up": 1, "planning step": 4}


def test_course_counts_what_a_run_does() -> None:
    """What run_density reckons with is what happens, for every policy whose plans do not depend on the data."""
    for method in (
        get_method("adaspa").replace(reuse="every:3"),
        get_method("recycled"),
        get_method("residual"),
        get_method("sol").replace(warmup=0.0, dense_every=4, end=0.9),
        get_method("auto").replace(density=(0.5, 0.2)),
        get_method("gna"),
    ):
        policy, planned_at, dense, plans = Policy(method), None, 0, 0
        for i in range(23):
            action = policy.action(StepInfo(step=i, steps=23), planned_at is not None, planned_at)
            dense += action in (Action.DENSE, Action.DENSE_AND_PLAN)
            if action in (Action.PLAN, Action.DENSE_AND_PLAN):
                plans, planned_at = plans + 1, i
        assert policy.course(23) == (dense, 23 - dense, plans)


# -- similar:c ------------------------------------------------------------------------------------------------------------


def _turning(at: int):  # type: ignore[no-untyped-def]
    """Queries whose mean points elsewhere from a step on."""

    def tensors(layer: int, step: int, branch: str):  # type: ignore[no-untyped-def]
        q, k, v = layer_tensors(layer, step, branch)
        push = torch.zeros(q.shape[-1])
        push[0 if step < at else 1] = 8.0
        return q + push, k, v

    return tensors


def test_a_turned_query_is_acted_upon_one_step_later() -> None:
    run = make_run("sol", 2, warmup=0.0, reuse="similar:0.9")
    _go(run, 8, tensors=_turning(4))
    # seen at step 4, acted upon at step 5; from then on the plan fits
    assert plan_steps(run) == {0: [0, 5], 1: [0, 5]}


def test_queries_that_stay_keep_their_plan() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse="similar:0.99")
    _go(run, 6, tensors=_turning(99))
    assert plan_steps(run)[0] == [0]


def test_similarity_works_without_a_clock() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse="similar:0.9")
    turn = _turning(3)
    for step in range(6):
        one_step(run, None, None, tensors=lambda layer, _, branch, step=step: turn(layer, step, branch))
    assert len(run.ledger.plans) == 2


def test_a_dense_turn_does_not_swallow_the_sign() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse="similar:0.9", dense_every=3)
    _go(run, 8, tensors=_turning(4))  # seen at 4, step 5 is a dense turn
    assert plan_steps(run)[0] == [0, 6]


def test_similarity_looks_at_the_branch_that_planned() -> None:
    """The other branch's queries differ from the start, which is no sign of age."""
    run = make_run("sol", 1, warmup=0.0, reuse="similar:0.999", branches="shared")

    def tensors(layer: int, step: int, branch: str):  # type: ignore[no-untyped-def]
        q, k, v = layer_tensors(layer)
        return (q, k, v) if branch == "cond" else (-q, k, v)

    _go(run, 5, branches=("cond", "uncond"), tensors=tensors)
    assert plan_steps(run)[0] == [0]


def test_similarity_comes_on_top_of_every() -> None:
    run = make_run("sol", 1, warmup=0.0, reuse=("every:4", "similar:0.9"))
    _go(run, 10, tensors=_turning(5))
    assert plan_steps(run)[0] == [0, 4, 6]


# -- leaders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layers", "expected"),
    [
        ("leaders:0x4", 6, (0, 0, 0, 0, 4, 4)),
        ("leaders:2", 5, (0, 1, 2, 2, 2)),
        ("leaders:every=3", 7, (0, 0, 0, 3, 3, 3, 6)),
        ("leaders:count=2", 7, (0, 0, 0, 3, 3, 3, 3)),
        ("leaders:count=1", 3, (0, 0, 0)),
        ("every:2", 3, (0, 1, 2)),
    ],
)
def test_who_leads(spec: str, layers: int, expected: tuple[int, ...]) -> None:
    assert parse_reuse((spec,)).leader_of(layers) == expected


def test_leaders_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"leaders must lie in 0..3 in a model of 4 layers, got leaders \[6\]"):
        make_run("sol", 4, reuse="leaders:0x6")
    with pytest.raises(ValueError, match="got 5 leaders"):
        make_run("sol", 4, reuse="leaders:count=5")


def test_followers_use_the_plan_of_their_leader() -> None:
    run = make_run("union", 4, order="axes", reuse=("every:2", "leaders:0x2"), density=0.3)
    _go(run, 8, branches=("cond", "uncond"))
    assert set(plan_steps(run)) == {0, 2}
    states = {key[:2] for key in run._states}
    assert states == {(0, "cond"), (0, "uncond"), (2, "cond"), (2, "uncond")}
    status = run.status()
    assert status.reasons == {"warm-up": 4 * 2 * 2 - 4, "planning step": 4}
    for follower, leader in ((1, 0), (3, 2)):
        assert status.layers[follower].orders == status.layers[leader].orders
        assert status.layers[follower].head_density == pytest.approx(status.layers[leader].head_density)
    # the very blocks: what a follower computes is what a plan of the leader gives on the follower's tensors
    plan = run._states[0, "cond", 1, False].plan
    assert plan is not None
    from dit_accel.plan import execute

    q, k, v = (x.transpose(1, 2) for x in layer_tensors(1))
    expected = execute(plan, q, k, v, scale=None, key_valid=None, backend="reference").transpose(1, 2)
    out = one_step(run, 7, 8, layers=[1])["cond", 1]
    assert torch.equal(out, expected)


def test_a_follower_whose_leader_has_no_plan_is_dense_and_says_so() -> None:
    run = make_run("sol", 3, warmup=0.0, reuse="leaders:0")
    out = one_step(run, 0, 4, layers=[1, 0, 2])  # as where other blocks run before those that lead
    assert run.status().reasons == {"leader layer 0 has no plan for this call": 1}
    q, k, v = layer_tensors(1)
    from driving import plain

    assert torch.equal(out["cond", 1], plain(q, k, v))
    one_step(run, 1, 4, layers=[1])
    assert sparse_steps(run, 1) == [1]


def test_dense_leaders_plan_afresh_and_stay_dense() -> None:
    run = make_run("tidal", 5, warmup=0.2)
    _go(run, 5)
    assert plan_steps(run) == {0: [0, 1, 2, 3, 4], 2: [0, 1, 2, 3, 4]}
    assert [plan.cost for plan in run.ledger.plans] == [0.5] * 10  # the log-sum-exp comes with their dense attention
    status = run.status()
    assert [layer.sparse for layer in status.layers] == [0, 4, 0, 4, 4]
    assert status.reasons == {"dense layer": 10, "warm-up": 3}


def test_delta_leads_every_fourth_layer() -> None:
    run = make_run("delta", 6)
    _go(run, 5)
    assert set(plan_steps(run)) == {0, 4}
    assert [layer.sparse for layer in run.status().layers] == [0, 4, 4, 4, 0, 4]


def test_an_interrupted_run_does_not_leave_plans_to_followers() -> None:
    run = make_run("sol", 2, warmup=0.5, reuse="leaders:0")
    _go(run, 4)
    one_step(run, 0, 4)
    one_step(run, 1, 4)
    assert sparse_steps(run, 1) == [2, 3]


# -- guidance branches ----------------------------------------------------------------------------------------------------


def test_the_conditional_branch_leads() -> None:
    run = make_run("adaspa", 2, branches="shared", refresh=(), reuse="every:2", warmup=0.25)
    _go(run, 8, branches=("cond", "uncond"))
    assert plan_steps(run) == {0: [1, 3, 5, 7], 1: [1, 3, 5, 7]}
    assert {key[1] for key in run._states} == {""}
    assert sparse_steps(run, 0) == [s for s in range(2, 8) for _ in range(2)]
    assert all(state.branch == "cond" for state in run._states.values())


# -- run_density ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "layers", "branches"),
    [
        ("sol", {"reuse": "every:3", "compensate": "drop", "select": "top_k"}, 2, ("cond",)),
        ("adaspa", {"reuse": ("every:2", "leaders:0x2"), "refresh": ()}, 4, ("cond", "uncond")),
        ("adaspa", {"branches": "shared", "reuse": "every:4", "refresh": (), "warmup": 0.2}, 2, ("cond", "uncond")),
        ("adaspa", {"warmup": 0.0, "refresh": (0.5,), "reuse": "leaders:every=2"}, 4, ("cond",)),
        ("tidal", {"warmup": 0.1}, 7, ("cond",)),
        ("delta", {"warmup": 0.1}, 8, ("cond",)),
        ("recycled", {"warmup": 0.1}, 2, ("cond",)),
        ("residual", {"score": "mean_pool", "select": "top_k", "refresh": (0.5,), "order": ("raster",)}, 1, ("cond",)),
        (
            "auto",
            {"order": ("raster",), "order_choice": "fixed", "dense_layers": (0,), "reuse": "every:5"},
            3,
            ("cond",),
        ),
    ],
)
def test_the_run_costs_what_was_asked_for(
    name: str, changes: dict[str, object], layers: int, branches: tuple[str, ...]
) -> None:
    asked = 0.75
    run = make_run(name, layers, run_density=asked, density=None, **changes)
    _go(run, 20, branches=branches)
    # 495 tokens are 8 blocks of 64, so a share can be missed by half a block in each row, and by ragged tails
    assert run.status().density == pytest.approx(asked, abs=0.07)


def test_run_density_of_leaders_is_exact_where_blocks_allow() -> None:
    """The arithmetic alone: planning is paid by leaders only."""
    run = make_run("adaspa", 4, run_density=0.6, reuse=("every:1", "leaders:0x2"), refresh=(), warmup=0.2)
    run.begin_forward(VIDEO, StepInfo(step=0, steps=10))
    density = run._density(VIDEO)
    plans = 9  # from the last warm-up step on
    assert density is not None
    assert (4 * 2 + 4 * 8 * density + 2 * plans * 0.5) / 40 == pytest.approx(0.6)


# -- what cannot go together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": "window", "reuse": "every:2"}, "reuse.*cannot go with score='window'"),
        (
            {"score": "mean_pool", "compensate": "residual", "reuse": "leaders:0"},
            "compensate='residual' cannot go with reuse",
        ),
        (
            {"score": "mean_pool", "compensate": "agent", "reuse": "leaders:0"},
            "compensate='agent' cannot go with reuse",
        ),
        ({"static": True, "reuse": "every:2"}, "reuse.*cannot go with static"),
        ({"score": "window", "select": "top_p:0.9"}, "select='top_p:0.9' cannot go with score='window'"),
        ({"reuse": ("every:2", "every:3")}, "names 'every' twice"),
    ],
)
def test_what_cannot_go_together(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Method(name="x", **fields)  # type: ignore[arg-type]
