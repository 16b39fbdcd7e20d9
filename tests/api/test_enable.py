"""The one line on a real pipeline: equality, undo, counting, bad input."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.runtime import ModelRun

Generate = Callable[..., Tensor]
METHODS = ("auto", "adaspa", "na", "gna", "dina")


def _relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", METHODS)
def test_everything_kept_equals_dense(pipe: Any, generate: Generate, name: str) -> None:
    dense = generate()
    with dit_accel.enable(pipe, name, min_tokens=0, density=1.0):
        out = generate()
        status = dit_accel.status(pipe)["transformer"]
    assert status.sparse_calls > 0
    assert status.sparse_density == 1.0
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_sparse_differs_and_disable_is_exact(pipe: Any, generate: Generate, name: str) -> None:
    originals = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    dense = generate()
    # A grid of five bricks has no window that visits a third of them, so the windows are given.
    options: dict[str, Any] = {"density": 0.3} if name in ("auto", "adaspa") else {"window": (3, 3, 3)}
    handle = dit_accel.enable(pipe, name, min_tokens=0, **options)
    out = generate()
    status = handle.stats()["transformer"]
    handle.disable()
    assert 1e-5 < _relative(out, dense) < 0.5
    assert 0 < status.sparse_density < (0.45 if "density" in options else 1.01)
    assert status.backend == "cpu"
    assert [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")] == originals
    assert torch.equal(generate(), dense)
    assert dit_accel.status(pipe) == {}


def test_status_counts_every_call(pipe: Any, generate: Generate) -> None:
    with dit_accel.enable(pipe, "adaspa", min_tokens=0, density=0.4, select="top_k") as handle:
        generate(steps=10)
        status = handle.stats()["transformer"]
    calls = 10 * 2 * 2  # steps, guidance branches, layers
    assert status.calls == calls
    assert status.sparse_calls == 8 * 2 * 2
    assert status.reasons == {"warm-up": 4, "planning step": 4}
    assert status.plans == 8  # planned at step 1, refreshed at step 6, per layer and branch
    assert status.cache_hits == status.sparse_calls - 4
    assert status.sparse_density == pytest.approx(0.4)  # 2 of 5 blocks a row
    expected = (2 * 2 * 2 + 8 * 4 * 0.4 + 8 * 0.5) / calls
    assert status.density == pytest.approx(expected)
    assert status.density_by_step[0] == 1.0
    assert status.density_by_step[1] == pytest.approx(1.5)
    assert status.density_by_step[9] == pytest.approx(0.4)
    assert [layer.sparse for layer in status.layers] == [16, 16]
    assert "blocks.0.attn1" in status.layers[0].name
    assert str(handle.status()) == str(handle.stats())
    json.dumps(status.to_dict())
    assert "density" in str(status)


def test_runs_are_independent(pipe: Any, generate: Generate) -> None:
    with dit_accel.enable(pipe, "auto", min_tokens=0, density=0.3) as handle:
        first = generate()
        assert torch.equal(generate(), first)
        assert handle.stats()["transformer"].calls == 5 * 2 * 2


def test_enabling_again_replaces(pipe: Any, generate: Generate) -> None:
    original = pipe.transformer.blocks[0].attn1.processor
    dit_accel.enable(pipe, "adaspa")
    handle = dit_accel.enable(pipe, "dense")
    assert "dense" in repr(handle)
    assert dit_accel.disable(pipe) is True
    assert dit_accel.disable(pipe) is False
    assert pipe.transformer.blocks[0].attn1.processor is original
    assert not handle.active


def test_context_manager_undoes_after_an_error(pipe: Any) -> None:
    original = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(ZeroDivisionError), dit_accel.enabled(pipe):
        raise ZeroDivisionError
    assert pipe.transformer.blocks[0].attn1.processor is original


def test_interrupted_run_leaves_the_next_clean(pipe: Any, generate: Generate) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with dit_accel.enable(pipe, "auto", min_tokens=0, density=0.3):
        clean = generate()
        with pytest.raises(KeyboardInterrupt):
            generate(callback_on_step_end=stop)
        assert torch.equal(generate(), clean)


def test_batch_elements_have_their_own_masks(pipe: Any, generate: Generate) -> None:
    with dit_accel.enable(pipe, "adaspa", min_tokens=0, density=0.4):
        out = generate(batch=2)
    assert out.shape[0] == 2
    assert torch.isfinite(out).all()


def test_bare_transformer(pipe: Any) -> None:
    gen = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 16, 16, generator=gen),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=gen),
    }
    with torch.no_grad():
        dense = pipe.transformer(**inputs).sample
        with dit_accel.enable(pipe.transformer, "auto", min_tokens=0, warmup=0.0, density=0.3) as handle:
            out = pipe.transformer(**inputs).sample
            assert handle.stats()["transformer"].sparse_calls == 2
    assert 0 < _relative(out, dense) < 0.3


def test_compiled_transformer_is_unwrapped(pipe: Any, generate: Generate) -> None:
    plain = pipe.transformer
    with dit_accel.enable(pipe, "auto", min_tokens=0, density=0.3):
        expected = generate()
    pipe.transformer = torch.compile(plain, backend="eager")
    with dit_accel.enable(pipe, "auto", min_tokens=0, density=0.3) as handle:
        out = generate()
        assert handle.stats()["transformer"].model == "WanTransformer3DModel"
        assert handle.stats()["transformer"].sparse_calls > 0
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_two_transformers_of_wan22(pipe: Any, generate: Generate) -> None:
    second = copy.deepcopy(pipe.transformer)
    two = type(pipe)(
        tokenizer=None,
        text_encoder=None,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        transformer=pipe.transformer,
        transformer_2=second,
        boundary_ratio=0.875,
    )
    two.set_progress_bar_config(disable=True)
    with dit_accel.enable(two, "auto", min_tokens=0, density=0.3, warmup=0.2) as handle:
        generate(steps=8, target=two)
        stats = handle.stats()
    assert set(stats) == {"transformer", "transformer_2"}
    assert stats["transformer_2"].sparse_calls > 0
    assert "warm-up" not in stats["transformer_2"].reasons  # progress is global


def test_short_sequences_stay_dense_and_say_so(pipe: Any, generate: Generate, caplog: pytest.LogCaptureFixture) -> None:
    dense = generate()
    with caplog.at_level(logging.WARNING, "dit_accel"), dit_accel.enable(pipe, min_tokens=5000):
        assert torch.equal(generate(), dense)
        status = dit_accel.status(pipe)["transformer"]
    assert status.reasons == {"320 tokens are fewer than min_tokens=5000": 20}
    assert status.density == 1.0
    assert sum("fewer than min_tokens=5000" in r.message for r in caplog.records) <= 1


def test_dense_layers_and_end(pipe: Any, generate: Generate) -> None:
    with dit_accel.enable(pipe, "auto", min_tokens=0, dense_layers=(-1,), end=0.8) as handle:
        generate()
        status = handle.stats()["transformer"]
    assert status.layers[1].sparse == 0
    assert status.layers[1].dense == {"dense layer": 10}
    assert status.layers[0].dense["end"] == 2


def test_nan_in_q_is_noted_and_spreads_no_further(pipe: Any) -> None:
    run = ModelRun(dit_accel.methods()[0], ("a",))
    by_name = {m.name: m for m in dit_accel.methods()}
    run = ModelRun(by_name["auto"].replace(warmup=0.0), model="Test", min_tokens=0)
    run.set_layers(("a",))
    geometry = dit_accel.TokenGeometry((5, 8, 8))
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 320, 2, 64, generator=gen) for _ in range(3))
    q[0, 17, 1] = float("nan")
    run.begin_forward(geometry, dit_accel.StepInfo(step=0, steps=4))
    out = run.attend(q, k, v, layer=0, scale=None, key_valid=None, dense=lambda q, k, v: q)
    bad = torch.isnan(out).any(-1)[0]
    assert bad[17, 1]
    assert bad.sum() == 1
    assert run.status().notes == ["attention scores were not finite: NaN or infinity in q or k"]


@pytest.mark.parametrize("options", [{}, {"warmup": 0.0}, {"end": 0.8}, {"dense_layers": (0,), "run_density": 0.8}])
def test_run_density_is_met(pipe: Any, generate: Generate, options: dict[str, Any]) -> None:
    options = {"run_density": 0.6, "select": "top_k", **options}
    with dit_accel.enable(pipe, "adaspa", min_tokens=0, **options) as handle:
        generate(steps=20)
        assert handle.stats()["transformer"].density == pytest.approx(
            options["run_density"], abs=0.08
        )  # five blocks a row


def test_run_density_that_cannot_be_reached_is_said_at_once(pipe: Any, generate: Generate) -> None:
    with (
        dit_accel.enable(pipe, "adaspa", min_tokens=0, run_density=0.1) as handle,
        pytest.raises(ValueError, match="run_density=0.1 cannot be reached: 2 of 10 steps are dense"),
    ):
        generate(steps=10)
    assert handle.stats()["transformer"].calls == 0


def test_shared_branches_plan_once(pipe: Any, generate: Generate) -> None:
    dense = generate()
    with dit_accel.enable(pipe, "union", min_tokens=0, density=0.3, branches="shared") as handle:
        out = generate()
        status = handle.stats()["transformer"]
    assert status.plans == 2  # one per layer, by the conditional branch
    assert status.reasons == {"planning step": 2, "warm-up": 2}
    assert 0 < _relative(out, dense) < 0.3


def test_one_step_is_not_planned(pipe: Any, generate: Generate) -> None:
    dense = generate(steps=1)
    with dit_accel.enable(pipe, "auto", min_tokens=0) as handle:
        assert torch.equal(generate(steps=1), dense)
        assert handle.stats()["transformer"].density == 1.0


def test_a_dropped_pipeline_is_freed(pipe: Any) -> None:
    model = copy.deepcopy(pipe.transformer)
    seen = weakref.ref(model)
    dit_accel.enable(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_failed_enable_leaves_what_was_in_force(pipe: Any, generate: Generate) -> None:
    with dit_accel.enable(pipe, "adaspa", min_tokens=0, density=0.4):
        expected = generate()
        with pytest.raises(ValueError, match="dense_layers must lie in"):
            dit_accel.enable(pipe, "adaspa", dense_layers=(99,))
        assert torch.equal(generate(), expected)
        assert dit_accel.status(pipe)["transformer"].sparse_calls > 0
    dit_accel.disable(pipe)


def test_one_transformer_of_two_can_be_replaced(pipe: Any) -> None:
    two = type(pipe)(
        tokenizer=None,
        text_encoder=None,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        transformer=pipe.transformer,
        transformer_2=copy.deepcopy(pipe.transformer),
        boundary_ratio=0.875,
    )
    dit_accel.enable(two, "auto")
    dit_accel.enable(two.transformer, "adaspa")
    assert {name: status.method for name, status in dit_accel.status(two).items()} == {
        "transformer": "adaspa",
        "transformer_2": "auto",
    }
    assert dit_accel.disable(two)
    assert dit_accel.status(two) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "autto"}, r"unknown method 'autto'.*did you mean 'auto'"),
        ({"density": 0}, "density must be above 0 and at most 1, or a pair of such numbers, got 0"),
        ({"density": 2}, "density must be above 0.*got 2"),
        ({"run_density": 1.5}, "run_density must be above 0 and at most 1, got 1.5"),
        ({"min_tokens": -1}, "min_tokens must be a number of tokens"),
        ({"backend": "cuda"}, "backend must be one of .*got 'cuda'"),
        ({"dense_layers": (7,)}, r"dense_layers must lie in -2..1, got \[7\]"),
        (
            {"colour": 1},
            "unknown option 'colour'; fields of a method are .*density.*; further options of enable are",
        ),
        ({"denisty": 0.3}, "did you mean 'density'"),
        ({"run_densty": 0.3}, "did you mean 'run_density'"),
        ({"sparsity": 0.7}, "did you mean density, which is 1 - sparsity"),
        ({"window": (3, 3, 3)}, "window would do nothing with method 'auto', whose score is 'spread'"),
        ({"density": (0.4,)}, r"or a pair of such numbers, got \(0.4,\)"),
        ({"score": "mean_pool", "select": "top_p:2"}, "select must be 'top_p:SHARE' with a share between 0 and 1"),
        ({"score": "mean_pool", "select": "top_p:much"}, "select must be 'top_p:SHARE' .* got 'top_p:much'"),
        ({"order": 3}, "order must be the name of an order, or several, got 3"),
        ({"compensate": None}, "compensate must be a name, .* got None"),
        ({"method": "dense", "run_density": 0.5}, "run_density goes with a method that keeps a share"),
        ({"run_density": "0.5"}, "run_density must be above 0"),
        ({"order": "hilbert"}, "hilbert"),
        ({"method": "paro"}, "static: make a plan first with dit_accel.calibrate"),
    ],
)
def test_bad_input_says_what_was_expected(pipe: Any, options: dict[str, Any], message: str) -> None:
    original = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, **options)
    assert pipe.transformer.blocks[0].attn1.processor is original


def test_targets_without_a_known_transformer(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected a diffusers pipeline with a transformer"):
        dit_accel.enable(object())
    with pytest.raises(ValueError, match="pipelines with a U-Net are not supported"):
        dit_accel.enable(type("Old", (), {"unet": nn.Linear(2, 2)})())
    with pytest.raises(ValueError, match="is a Linear, which no adapter knows; supported are .*WanTransformer3DModel"):
        dit_accel.enable(nn.Linear(2, 2))


def test_a_backend_that_cannot_run_raises(pipe: Any, generate: Generate) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with (
        dit_accel.enable(pipe, backend="triton", min_tokens=0, warmup=0.0),
        pytest.raises(ValueError, match="backend='triton' cannot be used: .*device must be cuda"),
    ):
        generate()


def test_a_window_that_does_not_fit_raises(pipe: Any, generate: Generate) -> None:
    with (
        dit_accel.enable(pipe, "dina", min_tokens=0, warmup=0.0, window=(3, 5, 5), dilation=(1, 3, 3)),
        pytest.raises(ValueError, match=r"window \* dilation must be at most 8, the height"),
    ):
        generate()


def test_supported_models_name_wan_and_flux() -> None:
    rows = dit_accel.supported_models()
    assert {"WanTransformer3DModel", "FluxTransformer2DModel"} <= {row["model"] for row in rows}
    assert all(row["task"] in ("video", "image") for row in rows)


def test_another_grid_of_as_many_tokens_is_planned_anew() -> None:
    by_name = {m.name: m for m in dit_accel.methods()}
    gen = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 320, 2, 64, generator=gen) for _ in range(3)]

    def attend(run: ModelRun, grid: tuple[int, int, int]) -> Tensor:
        run.begin_forward(dit_accel.TokenGeometry(grid), dit_accel.StepInfo(step=1, steps=4))
        return run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=lambda q, k, v: q)

    def fresh() -> ModelRun:
        run = ModelRun(by_name["na"].replace(warmup=0.0, window=(3, 3, 3)), model="Test", min_tokens=0)
        run.set_layers(("a",))
        return run

    run = fresh()
    first, second = attend(run, (5, 8, 8)), attend(run, (8, 5, 8))
    assert torch.equal(first, attend(fresh(), (5, 8, 8)))
    assert torch.equal(second, attend(fresh(), (8, 5, 8)))
    assert not torch.equal(first, second)
