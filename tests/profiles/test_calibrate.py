"""Calibration of a tiny random pipeline: what it measures, how it goes on after a stop, and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import make_profile
from typer.testing import CliRunner

import dit_accel
import dit_accel.calibration.run
from dit_accel.calibration.observe import Observer, parts_of_run
from dit_accel.calibration.quality import pictures, psnr
from dit_accel.calibration.run import Progress
from dit_accel.cli import app
from dit_accel.method import Method
from dit_accel.policy import Policy
from dit_accel.profiles import ANY_BRANCH, Profile

METHOD = Method(
    name="trial", density=0.2,
    order=("fhw", "hwf"), order_choice="recall", score="mass", select="top_k", compensate="mean", warmup=0.25,
    block_q=16, block_k=16, refresh=(), reuse=(), branches="separate",
)  # fmt: skip


def _calibrate(pipe: Any, target: str, prompts: tuple[str, ...] = ("a", "b"), **options: Any) -> Profile:
    found = dit_accel.calibrate(pipe, list(prompts), METHOD, target=target, output_type="latent", **options)
    assert isinstance(found, Profile)
    return found


def test_a_density_is_met_and_the_profile_says_what_was_measured(pipe: Any) -> None:
    profile = _calibrate(pipe, "density:0.4")
    part = profile.components["transformer"]
    assert float(part.density[ANY_BRANCH].mean()) == pytest.approx(0.4, abs=0.01)
    assert part.density[ANY_BRANCH].std() > 0.02
    assert (part.model, part.geometry.grid, part.heads) == ("WanTransformer3DModel", (5, 8, 8), 2)
    assert part.layers == ("blocks.0.attn1", "blocks.1.attn1")
    assert (profile.steps, profile.task, profile.method) == (4, "video", METHOD)
    assert 5 < profile.measured["psnr"] < 100
    # A dense step of four, with a plan, and three at 0.4 with pooled keys.
    assert profile.measured["density"] == pytest.approx((1 + 3 * (0.4 + 1 / 16)) / 4 + 0.15, abs=0.1)
    assert profile.made_on["versions"]["torch"] == torch.__version__
    with dit_accel.enable(pipe, profile=profile, min_tokens=0) as handle:
        pipe("c")
        assert handle.stats()["transformer"].sparse_density == pytest.approx(0.4, abs=0.03)


def test_what_was_allotted_is_better_than_the_same_density_for_all(pipe: Any) -> None:
    """On prompts that were not seen, at equal work: that is what calibration is for."""
    profile = _calibrate(pipe, "density:0.3", prompts=("a", "b", "c"))
    found = []
    for options in ({"profile": profile}, {"method": METHOD, "density": 0.3}):
        errors = []
        for prompt in ("x", "y", "z"):
            dense = pipe(prompt).frames
            with dit_accel.enable(pipe, min_tokens=0, **options) as handle:
                out = pipe(prompt).frames
                assert handle.stats()["transformer"].sparse_density == pytest.approx(0.3, abs=0.02)
            errors.append(float((out - dense).norm() / dense.norm()))
        found.append(sum(errors) / len(errors))
    assert found[0] < found[1]


def test_a_psnr_is_aimed_at(pipe: Any) -> None:
    wanted = round(_calibrate(pipe, "error:0.1").measured["psnr"], 2)
    profile = _calibrate(pipe, f"psnr:{wanted}", errors=(0.3, 0.003))
    assert profile.curve is not None
    assert len(profile.curve.points) >= 3
    psnrs = [point.psnr for point in profile.curve.points]
    assert psnrs[0] > psnrs[-1] + 6
    assert profile.error is not None
    assert profile.curve.error_for(wanted) == pytest.approx(profile.error)
    assert abs(profile.measured["psnr"] - wanted) < 2


def test_an_error_that_is_kept_while_it_runs(pipe: Any) -> None:
    profile = _calibrate(pipe, "error:0.1", control="error")
    assert (profile.control, profile.error) == ("error", 0.1)
    assert profile.components["transformer"].orders == ()
    with dit_accel.enable(pipe, profile=profile, min_tokens=0) as handle:
        pipe("c")
        by_profile = handle.stats()["transformer"].density
    with dit_accel.enable(pipe, METHOD, target_error=0.1, min_tokens=0) as handle:
        pipe("c")
        assert handle.stats()["transformer"].density == pytest.approx(by_profile)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_stopped_calibration_goes_on(pipe: Any, tmp_path: Path, at: int) -> None:
    whole = _calibrate(pipe, "error:0.1", errors=(0.3,))
    pipe.seen.clear()

    def stop(progress: Progress) -> None:
        if progress.done == at:
            raise Stop

    before = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(Stop):
        _calibrate(pipe, "error:0.1", errors=(0.3,), folder=tmp_path, progress=stop)
    assert len(pipe.seen) == at
    assert pipe.transformer.blocks[0].attn1.processor is before
    told: list[Progress] = []
    again = _calibrate(pipe, "error:0.1", errors=(0.3,), folder=tmp_path, progress=told.append)
    assert len(pipe.seen) == 6  # nothing was done twice
    assert told[0].done == at
    assert told[-1] == Progress(6, 6, "done")
    assert again.curve == whole.curve
    assert torch.equal(
        again.components["transformer"].density[ANY_BRANCH], whole.components["transformer"].density[ANY_BRANCH]
    )


def test_a_pipeline_that_fails_leaves_no_half_result(pipe: Any, tmp_path: Path) -> None:
    real, left = type(pipe).__call__, [2]

    class Failing(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: str, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("out of memory")
            return real(self, prompt, **options)

    with pytest.raises(RuntimeError, match="out of memory"):
        _calibrate(Failing(pipe.pipe), "density:0.4", folder=tmp_path)
    pipe.seen.clear()
    _calibrate(pipe, "density:0.4", folder=tmp_path)
    assert pipe.seen == ["b", "a", "b"]


def test_work_of_other_settings_is_refused(pipe: Any, tmp_path: Path) -> None:
    _calibrate(pipe, "density:0.4", folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds a calibration with other settings \(prompts, seed differ\)"):
        _calibrate(pipe, "density:0.4", prompts=("c",), seed=5, folder=tmp_path)
    pipe.seen.clear()
    _calibrate(pipe, "density:0.6", folder=tmp_path)  # another target from the same dense runs
    assert len(pipe.seen) == 2
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read; remove the folder"):
        _calibrate(pipe, "density:0.4", folder=tmp_path)


def test_static_methods_give_a_plan_or_a_profile_with_it(pipe: Any, tmp_path: Path) -> None:
    plan = dit_accel.calibrate(pipe, ["a"], overrides={"density": 0.4})
    assert isinstance(plan, dit_accel.StaticPlan)
    profile = dit_accel.calibrate(pipe, ["a"], "paro", target="density:0.4", folder=tmp_path / "work")
    assert isinstance(profile, Profile)
    assert profile.control == "plan"
    profile.save(tmp_path / "profile")
    with dit_accel.enable(pipe, profile=tmp_path / "profile", min_tokens=0) as handle:
        out = pipe("c").frames
        assert handle.stats()["transformer"].sparse_calls == 16
    with dit_accel.enable(pipe, "paro", plan=plan, min_tokens=0):
        torch.testing.assert_close(pipe("c").frames, out)
    with pytest.raises(ValueError, match="its target is a density"):
        dit_accel.calibrate(pipe, ["a"], "paro", target="psnr:30")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_stopped_static_calibration_goes_on(pipe: Any, tmp_path: Path, at: int) -> None:
    whole = dit_accel.calibrate(pipe, ["a", "b"])
    pipe.seen.clear()

    def stop(progress: Progress) -> None:
        if progress.done == at:
            raise Stop

    with pytest.raises(Stop):
        dit_accel.calibrate(pipe, ["a", "b"], folder=tmp_path, progress=stop)
    again = dit_accel.calibrate(pipe, ["a", "b"], folder=tmp_path)
    assert pipe.seen == ["a", "b", "a", "b"]
    assert isinstance(whole, dit_accel.StaticPlan)
    assert isinstance(again, dit_accel.StaticPlan)
    assert torch.equal(again.bits, whole.bits)
    assert torch.equal(again.head_choice, whole.head_choice)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "density:0.3", "method": "gna"}, "cannot be calibrated to density:0.3: score='.*' is a pattern"),
        ({"target": "nothing"}, "a target is 'psnr:DB'"),
        ({"target": "density:0.3", "control": "error"}, "control='error' keeps an error"),
        ({"target": "psnr:30", "control": "magic"}, "control must be 'density' or 'error'"),
        ({"target": "psnr:30", "errors": (2.0,)}, "errors must be above 0 and below 1"),
        ({"method": "auto"}, "needs no calibration, it plans during the run; give target="),
        ({"target": "psnr:30", "generator": None}, "generator cannot be given: prompts= and seed= say what is run"),
        ({"target": "psnr:30", "component": "unet"}, "component must be one of transformer"),
        (
            {"target": "psnr:30", "overrides": {"warmup": 1.0}, "num_inference_steps": 2},
            "saw no attention|no attention is",
        ),
    ],
)
def test_bad_calibrations_raise(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.calibrate(pipe, ["a"], **options)


def test_parts_begin_where_plans_are_made() -> None:
    def parts(steps: int, **changes: Any) -> tuple[tuple[float, ...], dict[int, int]]:
        return parts_of_run(Policy(METHOD.replace(warmup=0.2, **changes)), steps)

    starts, looked_at = parts(20)
    assert starts == (0.0,)
    assert looked_at == {4: 0, 12: 0, 19: 0}
    starts, looked_at = parts(20, refresh=(0.4, 0.7))
    assert starts == (0.0, 0.4, 0.7)
    assert {part: sorted(s for s, p in looked_at.items() if p == part) for part in range(3)} == {
        0: [4, 6, 7],
        1: [8, 10, 13],
        2: [14, 16, 19],
    } or sorted(set(looked_at.values())) == [0, 1, 2]
    starts, looked_at = parts(40, reuse=("every:4",))
    assert len(starts) == 3
    assert starts[0] == 0.0
    assert sorted(starts) == list(starts)


def test_what_an_observer_holds_does_not_grow(pipe: Any) -> None:
    """Twice as many prompts, as many bytes."""
    sizes = []
    real = dit_accel.calibration.run.Observer
    for prompts in (("a",), ("a", "b", "c")):
        made: list[Observer] = []

        def make(made: list[Observer] = made) -> Observer:
            made.append(real())
            return made[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dit_accel.calibration.run, "Observer", make)
            make.restore = real.restore  # type: ignore[attr-defined]
            _calibrate(pipe, "density:0.5", prompts=prompts)
        tensors, _ = made[0].state()
        sizes.append(sum(t.numel() for t in tensors.values()))
        assert not made[0]._probes
    assert sizes[0] == sizes[1]


def test_pictures_and_psnr() -> None:
    import numpy as np
    from PIL import Image

    zeros, half = np.zeros((1, 2, 4, 4, 3), np.float32), np.full((1, 2, 4, 4, 3), 0.5, np.float32)
    assert psnr(pictures(zeros), pictures(zeros)) == 100.0
    assert psnr(pictures(half), pictures(zeros)) == pytest.approx(20 * np.log10(255 / 128), abs=1e-6)
    one = half.copy()
    one[:, 0] = 0  # one frame is equal, the other is not
    assert psnr(pictures(one), pictures(zeros)) == pytest.approx((100 + 20 * np.log10(255 / 128)) / 2, abs=1e-6)
    images = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 255)]
    assert pictures(images).dtype == torch.uint8
    latents = torch.linspace(-2, 2, 48).view(1, 3, 4, 4)
    assert psnr(pictures((latents + 0.4,)), pictures((latents,))) == pytest.approx(20.0, abs=1e-4)
    with pytest.raises(ValueError, match="one shape"):
        psnr(pictures(half), pictures(zeros[:, :1]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        pictures(np.full((1, 2, 2), np.nan))
    with pytest.raises(ValueError, match="expected frames, images or latents"):
        pictures("nothing")


def test_the_command_writes_a_profile(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_accel_eval.runs.pipeline as loading

    asked: dict[str, Any] = {}

    def calibrate(_pipe: Any, prompts: list[str], method: str | None, **options: Any) -> Profile:
        asked.update(options, prompts=prompts, method=method)
        return make_profile()

    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(loading, "call_arguments", lambda _pipe, **options: {"num_inference_steps": options["steps"]})
    monkeypatch.setattr("dit_accel.calibration.command.calibrate", calibrate)
    (tmp_path / "prompts.txt").write_text("a cat\n\n# no\na dog\na bird\n")
    words = [
        "calibrate",
        "somewhere",
        "--target",
        "psnr:35",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--count",
        "2",
    ]
    words += ["--out", str(tmp_path / "made"), "--steps", "6", "--errors", "0.1,0.03", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert asked["prompts"] == ["a cat", "a dog"]
    assert (asked["target"], asked["errors"], asked["num_inference_steps"]) == ("psnr:35", [0.1, 0.03], 6)
    assert Profile.load(tmp_path / "made").target == "psnr:35"
    assert "written to" in done.output
    monkeypatch.undo()
    bad = CliRunner().invoke(app, ["calibrate", str(tmp_path), "--target", "x", "--prompts", str(tmp_path / "none")])
    assert bad.exit_code == 2
    assert "no prompts at" in bad.output
