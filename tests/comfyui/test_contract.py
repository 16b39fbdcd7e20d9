"""The override itself: every form of call, chaining, clones, callbacks of both versions, clean-up."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from comfy_fakes import Container, Executor, Patcher, WanModel, attention, dense_attention, prompt, sample
from torch import Tensor

from dit_accel_patches.comfyui.override import FORWARD, OVERRIDE, install, session_of_override
from dit_accel_patches.comfyui.patching import accelerate, decelerate, session_of
from dit_accel_patches.comfyui.settings import Settings

SETTINGS = Settings(quality="custom", density=0.3, min_tokens=0, start_percent=0.0)
TOKENS, HEADS, DIM = 512, 2, 64


def patched(core: str) -> Patcher:
    torch.manual_seed(0)
    return accelerate(Patcher(WanModel(core).eval(), core), SETTINGS)


def forward_options(patcher: Patcher, sigma: float = 0.5) -> dict[str, Any]:
    """Options inside a forward call of a 2x16x16 grid."""
    options: dict[str, Any] = {
        "sample_sigmas": torch.linspace(1, 0, 5),
        "sigmas": torch.tensor([sigma]),
        "uuids": ["a"],
        **patcher.model_options["transformer_options"],
    }
    latent = torch.zeros(1, 4, 2, 32, 32)
    options[FORWARD] = session_of(patcher).begin_forward(patcher.model, (latent,), {}, options)
    return options


def qkv(split: bool, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    made = [torch.randn(1, heads, TOKENS, DIM) for _ in range(3)]
    return tuple(made) if split else tuple(x.transpose(1, 2).flatten(2) for x in made)  # type: ignore[return-value]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("form", ["position", "keyword", "mask by position", "containers"])
def test_every_form_of_call_gives_the_same(core: str, split: bool, keep: bool, form: str) -> None:
    """What comes out does not depend on how it was asked for, and is not dense attention."""
    kwargs = {"skip_reshape": split, "skip_output_reshape": keep, "unknown_to_us": 3}
    patcher = patched(core)
    q, k, v = qkv(split)
    expected = dense_attention(q, k, v, HEADS, **kwargs)
    options = forward_options(patcher)
    args: tuple[Any, ...] = (q, k, v, HEADS)
    if form == "mask by position":
        args += (None,)
    if form == "keyword":
        args, kwargs["heads"] = args[:3], HEADS
    if form == "containers":
        args = (*map(Container, args[:3]), HEADS)  # type: ignore[arg-type]
    got = attention(*args, transformer_options=options, **kwargs)
    assert got.shape == expected.shape
    assert not torch.allclose(got, expected, atol=1e-3)
    same = attention(*qkv(True), HEADS, skip_reshape=True, transformer_options=forward_options(patched(core)))
    assert torch.equal(got.transpose(1, 2).flatten(2) if keep else got, same)


def test_what_is_not_ours_passes_untouched(core: str) -> None:
    """Cross-attention, text, other types, calls outside a forward call: the function gets exactly what was given."""
    patcher = patched(core)
    seen: list[tuple[Any, Any]] = []

    def func(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "dense"

    override = patcher.model_options["transformer_options"][OVERRIDE]
    options = forward_options(patcher)
    q, k, v = qkv(False)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((q, k[:, :9], v[:, :9], HEADS), {"transformer_options": options}),
        ((q[:, :9], k[:, :9], v[:, :9]), {"heads": HEADS, "transformer_options": options}),
        ((q, k, v, HEADS), {"transformer_options": {}, "x": 1}),
        ((q, k, v, HEADS), {}),
        ((q, k.half(), v.half(), HEADS), {"transformer_options": options}),
    ]
    for args, kwargs in calls:
        assert override(func, *args, **kwargs) == "dense"
        got_args, got_kwargs = seen.pop()
        assert all(a is b for a, b in zip(got_args, args, strict=True))
        assert got_kwargs == kwargs
    assert not session_of(patcher).status()


def test_scale_and_grouped_keys(core: str) -> None:
    patcher = accelerate(Patcher(WanModel(core).eval(), core), Settings(quality="custom", density=1.0, min_tokens=0))
    q, k, v = qkv(True, heads=4)
    options = {"skip_reshape": True, "scale": 0.05, "enable_gqa": True}
    expected = dense_attention(q, k[:, :2], v[:, :2], 4, **options)
    got = attention(q, k[:, :2], v[:, :2], 4, transformer_options=forward_options(patcher), **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_float32_inside_is_respected(core: str) -> None:
    patcher = patched(core)
    q, k, v = (x.bfloat16() for x in qkv(True))
    options = forward_options(patcher)
    got = attention(q, k, v, HEADS, skip_reshape=True, attn_precision=torch.float32, transformer_options=options)
    assert torch.equal(got, dense_attention(q, k, v, HEADS, skip_reshape=True))
    assert "the model asks for float32 attention" in str(session_of(patcher).status()[0])


def other_node(patcher: Patcher, log: list[str], chained: bool = False) -> Patcher:
    """A node behind ours that sets an override: it drops what was there, or calls it."""
    clone = patcher.clone()
    below = clone.model_options["transformer_options"].get(OVERRIDE)

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        log.append("other")
        if chained and below is not None:
            return below(func, *args, **kwargs)
        return func(*args, **kwargs)

    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def world(core: str) -> tuple[Patcher, Tensor, list[Any]]:
    torch.manual_seed(0)
    return Patcher(WanModel(core).eval(), core), torch.randn(1, 4, 2, 32, 32), [prompt(7, 128, 1)]


def test_chains_to_the_override_before_it(core: str) -> None:
    patcher, noise, prompts = world(core)
    log: list[str] = []
    before = other_node(patcher, log)
    expected = sample(accelerate(patcher, SETTINGS), noise, prompts)
    fast = accelerate(before, SETTINGS)
    assert torch.equal(sample(fast, noise, prompts), expected)
    assert len(log) == 5 * 2  # the cross-attention of two blocks; self-attention is planned and sparse from the start
    assert decelerate(fast).model_options["transformer_options"] == before.model_options["transformer_options"]


@pytest.mark.parametrize("chained", [False, True])
def test_stands_on_top_of_a_node_behind_it(core: str, chained: bool) -> None:
    """A later node cannot silently replace it, and is used for what stays dense."""
    patcher, noise, prompts = world(core)
    expected = sample(accelerate(patcher, SETTINGS), noise, prompts)
    log: list[str] = []
    behind = other_node(accelerate(patcher, SETTINGS), log, chained)
    assert torch.equal(sample(behind, noise, prompts), expected)
    assert len(log) == 10
    (status,) = session_of(behind).status()
    assert status.calls == status.sparse_calls == 10


def test_install_is_idempotent(core: str) -> None:
    patcher = patched(core)
    options = patcher.model_options["transformer_options"]
    override = options[OVERRIDE]
    for _ in range(3):
        install(session_of(patcher), options)
        assert options[OVERRIDE] is override


def test_prepare_state_of_both_versions(core: str) -> None:
    patcher = patched(core)
    (prepare,) = patcher.callbacks["on_prepare_state"]["dit_accel"]
    options = {"transformer_options": {OVERRIDE: dense_attention}}
    if core == "new":
        prepare(patcher, torch.ones(1), options)
        assert session_of_override(options["transformer_options"][OVERRIDE]) is session_of(patcher)
        prepare(patcher, torch.ones(1), options, "what a later version adds")
    else:
        patcher.model_options = options
        prepare(patcher, torch.ones(1))
        assert session_of_override(options["transformer_options"][OVERRIDE]) is session_of(patcher)


def test_a_deep_copy_of_the_options_copies_no_state(core: str) -> None:
    patcher, noise, prompts = world(core)
    fast = accelerate(patcher, SETTINGS)
    copied: list[Any] = []

    def each(step: int, options: dict[str, Any]) -> None:
        if step == 3:
            assert session_of(fast)._runs
            copied.append(copy.deepcopy(fast.model_options))

    sample(fast, noise, prompts, each=each)
    override = copied[0]["transformer_options"][OVERRIDE]
    assert session_of_override(override) is session_of(fast)


def test_cleanup_frees_everything(core: str) -> None:
    patcher, noise, prompts = world(core)
    fast = accelerate(patcher, SETTINGS)
    alive: list[weakref.ref[Any]] = []

    def each(step: int, _: dict[str, Any]) -> None:
        if step == 3:
            alive.extend(weakref.ref(run) for run in session_of(fast)._runs.values())

    sample(fast, noise, prompts, each=each)
    gc.collect()
    assert alive
    assert all(reference() is None for reference in alive)
    assert session_of(fast).status()[0].sparse_calls == 10


def test_nothing_keeps_the_model_alive(core: str) -> None:
    patcher, noise, prompts = world(core)
    fast = accelerate(patcher, SETTINGS)
    sample(fast, noise, prompts)
    session, model = session_of(fast), weakref.ref(patcher.model)
    del patcher, fast
    gc.collect()
    assert model() is None
    assert session.status()


def test_state_travels_with_the_call_and_leaves_no_trace(core: str) -> None:
    patcher = patched(core)
    (wrapper,) = patcher.wrappers["diffusion_model"]["dit_accel"]
    options: dict[str, Any] = {"sigmas": torch.ones(1)}
    seen = []

    def inner(x: Tensor, transformer_options: dict[str, Any]) -> str:
        seen.append(transformer_options[FORWARD])
        return "out"

    executor = Executor(inner, patcher.model, [wrapper])
    assert executor.execute(torch.zeros(1, 4, 2, 32, 32), transformer_options=options) == "out"
    assert seen[0].session is session_of(patcher)
    assert FORWARD not in options

    def failing(x: Tensor, transformer_options: dict[str, Any]) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Executor(failing, patcher.model, [wrapper]).execute(torch.zeros(1, 4, 2, 32, 32), transformer_options=options)
    assert FORWARD not in options


def test_positional_options_are_found(core: str) -> None:
    patcher = patched(core)
    (wrapper,) = patcher.wrappers["diffusion_model"]["dit_accel"]
    options = {"sigmas": torch.ones(1)}
    executor = Executor(lambda *args: FORWARD in args[-1], patcher.model, [wrapper])
    assert executor.execute(torch.zeros(1, 4, 2, 32, 32), torch.ones(1), None, None, None, options)
    assert executor.execute(torch.zeros(1, 4, 2, 32, 32), torch.ones(1), {}) is False


def test_a_call_is_counted_once_whatever_stands_between(core: str) -> None:
    """A node behind ours that calls our override again for what we left dense."""
    patcher, noise, prompts = world(core)
    settings = Settings(quality="custom", density=0.3, min_tokens=0, start_percent=0.0, dense_blocks=(0,))
    log: list[str] = []
    behind = other_node(accelerate(patcher, settings), log, chained=True)
    sample(behind, noise, prompts)
    (status,) = session_of(behind).status()
    assert (status.calls, status.sparse_calls) == (10, 5)
    assert status.reasons == {"dense layer": 5}


def test_a_session_replaces_another(core: str) -> None:
    first, second = patched(core), patched(core)
    options = {OVERRIDE: first.model_options["transformer_options"][OVERRIDE]}
    install(session_of(second), options)
    assert session_of_override(options[OVERRIDE]) is session_of(second)
    assert options[OVERRIDE]._dit_accel_previous is None  # the other one is not kept below


def test_passes_of_a_step_are_told_apart(core: str) -> None:
    """Windows and tiles call with the same conditioning and sigma; each keeps its name from step to step."""
    patcher = patched(core)
    base = {"sample_sigmas": torch.linspace(1, 0, 5)}
    session, latent = session_of(patcher), torch.zeros(1, 4, 2, 32, 32)

    def branches(sigma: float) -> list[str]:
        return [
            session.begin_forward(
                patcher.model, (latent,), {}, {**base, "sigmas": torch.tensor([sigma]), "uuids": [who]}
            ).step.branch
            for who in "aabbb"
        ]

    first = branches(1.0)
    assert len(set(first)) == 5
    assert branches(0.75) == first
