from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks import hooks
from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.clock import Clock, _is_captured
from dit_accel_patches.flux import ADAPTER as FLUX
from dit_accel_patches.install import install
from dit_accel_patches.wan import ADAPTER as WAN

GRID = TokenGeometry(grid=(3, 2, 3))


class Model(nn.Module):
    def forward(self, hidden_states, timestep=None):
        return hidden_states


def feed(clock, *timesteps, geometry=GRID, positional=False):
    model, told = Model(), []
    for value in timesteps:
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor([float(value)])
        args, kwargs = ((None, tensor), {}) if positional else ((None,), {"timestep": tensor})
        told.append(clock.tick(model, args, kwargs, None, geometry))
    return told


def brief(told):
    return [(info.step, info.branch, fresh) for info, fresh in told]


@pytest.mark.skipif(not hasattr(hooks, "CacheContext"), reason="this diffusers names the branch only")
def test_wan_pipeline_tells_the_step_itself(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run)
    wan(num_inference_steps=3)
    infos = [info for _, info in run.forwards]
    assert run.steps == [(s, b) for s in range(3) for b in ("cond", "uncond")]
    assert {(i.steps, i.source) for i in infos} == {(3, "context")}
    assert [i.progress for i in infos[::2]] == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert infos[0].timestep == 1000.0


def test_flux_pipeline_is_read_from_its_scheduler(flux, make_run):
    run = make_run()
    install(flux.model, FLUX, run, pipe=flux.pipe)
    flux()
    infos = [info for _, info in run.forwards]
    assert run.steps == [(0, "cond"), (1, "cond"), (2, "cond")]
    assert {(i.steps, i.source) for i in infos} == {(3, "scheduler")}
    assert infos[1].progress == pytest.approx(1 / 3)


def test_flux_guidance_branches_have_names(flux, make_run):
    run = make_run()
    install(flux.model, FLUX, run, pipe=flux.pipe)
    flux(
        true_cfg_scale=2.0,
        negative_prompt_embeds=torch.randn(1, 16, 32),
        negative_pooled_prompt_embeds=torch.randn(1, 32),
        num_inference_steps=2,
    )
    assert run.steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert run.resets == 1


def test_flux_without_the_pipeline_falls_back_to_timesteps(flux, make_run):
    run = make_run()
    install(flux.model, FLUX, run)
    flux()
    infos = [info for _, info in run.forwards]
    assert run.steps == [(0, "cond"), (1, "cond"), (2, "cond")]
    assert {(i.steps, i.source) for i in infos} == {(None, "timestep")}
    assert infos[0].progress == 0.0
    assert infos[0].progress < infos[1].progress < infos[2].progress < 1


def test_wan22_progress_is_global_in_both_transformers(wan22, make_run):
    runs = {}
    for name in ("transformer", "transformer_2"):
        runs[name] = make_run()
        install(getattr(wan22.pipe, name), WAN, runs[name], pipe=wan22.pipe)
    wan22()
    first, second = (runs[n].forwards for n in ("transformer", "transformer_2"))
    assert len(first) + len(second) == 8
    assert {s.steps for _, s in first + second} == {4}
    assert sorted({s.step for _, s in first + second}) == [0, 1, 2, 3]
    start = second[0][1]
    assert start.step > 0
    assert start.progress == start.step / 4
    assert [runs[n].resets for n in runs] == [1, 1]


def test_wan22_progress_is_global_without_context_too(wan22, make_run, wan_inputs):
    run = make_run()
    install(wan22.pipe.transformer_2, WAN, run)
    with torch.no_grad():
        wan22.pipe.transformer_2(**{**wan_inputs, "timestep": torch.tensor([600.0])})
    info = run.forwards[0][1]
    assert (info.step, info.source) == (0, "timestep")
    assert info.progress == pytest.approx(0.4)


def test_direct_calls_are_counted_by_timestep(wan, make_run, wan_inputs):
    run = make_run()
    install(wan.model, WAN, run, pipe=wan.pipe)
    wan()
    assert run.resets == 1
    run.forwards.clear()
    with torch.no_grad():
        for value in (900.0, 900.0, 500.0, 500.0, 100.0):
            wan.model(**{**wan_inputs, "timestep": torch.tensor([value])})
    assert run.steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (2, "cond")]
    assert {s.source for _, s in run.forwards} == {"timestep"}


def test_end_of_a_pipeline_call_resets(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run)
    wan()
    assert run.resets == 1
    wan(num_inference_steps=1)
    wan(num_inference_steps=1)
    assert run.resets == 3
    assert run.steps[-4:] == [(0, "cond"), (0, "uncond")] * 2


def test_an_interrupted_run_is_reset_by_the_next(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            wan(num_inference_steps=3, callback_on_step_end=stop)
    assert run.resets == 1
    wan()
    assert run.resets == 3
    assert run.steps[4:] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]


def test_a_named_branch_that_comes_again_in_the_first_step_is_a_new_run():
    clock, model = Clock(), Model()
    told = []
    for name, value in (("cond", 9.0), ("uncond", 9.0), ("cond", 9.0), ("uncond", 9.0), ("cond", 5.0), ("cond", 5.0)):
        context = SimpleNamespace(name=name)
        told.append(clock.tick(model, (None,), {"timestep": torch.tensor([value])}, context, GRID))
    assert [fresh for _, fresh in told] == [True, False, True, False, False, False]
    assert [info.step for info, _ in told] == [0, 0, 0, 0, 1, 1]


def test_timestep_going_up_is_a_new_run():
    told = feed(Clock(), 900, 400, 900, 900, 400)
    assert brief(told) == [
        (0, "cond", True),
        (1, "cond", False),
        (0, "cond", True),
        (0, "uncond", False),
        (1, "cond", False),
    ]


def test_change_of_grid_is_a_new_run_and_of_text_is_not():
    clock = Clock()
    assert brief(feed(clock, 900))[0][2]
    assert not brief(feed(clock, 800, geometry=TokenGeometry(grid=(3, 2, 3), prefix=7)))[0][2]
    assert brief(feed(clock, 700, geometry=TokenGeometry(grid=(3, 4, 3))))[0][2]


@pytest.mark.parametrize(
    ("value", "progress"),
    [
        (torch.tensor(250.0), 0.75),
        (torch.tensor(250), 0.75),
        (torch.tensor([250.0, 250.0]), 0.75),
        (torch.tensor([[0.0, 250.0, 250.0]]), 0.75),
        (torch.tensor([0.25]), 0.75),
        (torch.tensor([1.0], dtype=torch.bfloat16), 0.0),
        (torch.tensor([1000.0]), 0.0),
    ],
)
@pytest.mark.parametrize("positional", [False, True])
def test_shapes_and_ranges_of_timesteps(value, progress, positional):
    ((info, _),) = feed(Clock(), value, positional=positional)
    assert info.progress == pytest.approx(progress)
    assert info.timestep == pytest.approx(float(value.max()))


def test_unit_range_is_kept_within_a_run():
    told = feed(Clock(), 1.0, 0.5, 0.25)
    assert [info.progress for info, _ in told] == [0.0, 0.5, 0.75]


def test_last_timesteps_below_one_stay_in_the_range_of_a_thousand():
    told = feed(Clock(), 1000, 500, 0.5)
    assert told[-1][0].progress == pytest.approx(0.9995)


def test_progress_stays_below_one():
    assert feed(Clock(), 500, 0)[-1][0].progress < 1


def test_nobody_knows():
    info, fresh = Clock().tick(Model(), (None,), {}, None, "no grid")
    assert (info.step, info.progress, info.source, info.branch, fresh) == (None, None, "calls", "cond", True)


def test_a_device_is_not_read_when_the_scheduler_knows(flux, make_run, monkeypatch):
    """A tensor that refuses to be read stands for one on an accelerator."""
    from dit_accel_patches import clock as module

    waited = []
    real = module._to_float

    def spy(value, *, wait):
        waited.append(wait)
        return real(value, wait=wait) if not isinstance(value, torch.Tensor) or wait else None

    monkeypatch.setattr(module, "_to_float", spy)
    run = make_run()
    install(flux.model, FLUX, run, pipe=flux.pipe)
    flux()
    assert True not in waited
    assert run.steps == [(0, "cond"), (1, "cond"), (2, "cond")]


def test_one_step_runs_without_a_reset_hook_differ_by_schedule(flux):
    clock, model = Clock(flux.pipe), Model()
    scheduler = flux.pipe.scheduler
    flux.pipe._current_timestep = torch.tensor(1000.0)
    told = []
    for _ in range(2):
        scheduler.set_timesteps(1)
        told.append(clock.tick(model, (None,), {"timestep": torch.tensor([1.0])}, None, GRID))
    assert [(i.step, i.branch, fresh) for i, fresh in told] == [(0, "cond", True), (0, "cond", True)]


def test_a_stale_scheduler_is_not_believed(flux):
    clock = Clock(flux.pipe)
    flux.pipe.scheduler.set_timesteps(5, mu=1.0) if flux.pipe.scheduler.config.use_dynamic_shifting else (
        flux.pipe.scheduler.set_timesteps(5)
    )
    flux.pipe._current_timestep = torch.tensor(900.0)
    told = feed(clock, 300, 200)
    assert [(i.step, i.source) for i, _ in told] == [(0, "timestep"), (1, "timestep")]


def test_what_is_captured_is_like_the_call_before(monkeypatch):
    clock = Clock()
    before = feed(clock, 900, 800)
    with monkeypatch.context() as patch:
        patch.setattr("dit_accel_patches.clock._is_captured", lambda value: isinstance(value, torch.Tensor))
        (captured,) = feed(clock, 700)
    told, fresh = captured
    assert (told.step, told.branch, told.progress, fresh) == (None, "cond", before[-1][0].progress, False)
    assert brief(feed(clock, 700)) == [(2, "cond", False)]
    assert not _is_captured(torch.zeros(1))
