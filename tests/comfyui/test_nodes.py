"""The nodes as ComfyUI sees them, and the repository as a custom node."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_fakes import Flux, Patcher, UNetModel, WanModel, prompt, sample

from dit_accel_patches.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from dit_accel_patches.comfyui.__main__ import main
from dit_accel_patches.comfyui.patching import session_of
from dit_accel_patches.comfyui.profile import Profile

ROOT = Path(__file__).absolute().parents[2]
CHOICES = {
    "method": "auto",
    "quality": "custom",
    "density": 0.3,
    "precision": "model",
    "start_percent": 0.2,
    "end_percent": 1.0,
    "dense_blocks": "",
    "min_tokens": 0,
    "block_size": "64",
    "verbose": False,
}


class Decoder:
    """A VAE: three channels of the latent, as a video if the latent is one."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return samples[:, :3].movedim(1, -1).sigmoid()


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """ComfyUI's ``nodes`` and ``folder_paths``; the sampler is the fake one."""
    torch.manual_seed(0)
    noise = torch.randn(1, 4, 2, 32, 32)

    def common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=1.0):  # type: ignore[no-untyped-def]
        return ({"samples": sample(model, noise, [positive], steps)},)

    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(common_ksampler=common_ksampler))
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(models_dir=str(tmp_path / "models")))
    patcher = Patcher(WanModel("new").eval(), "new")
    sampling = {
        "positive": prompt(7, 128, 1),
        "negative": None,
        "latent_image": {"samples": noise},
        "seed": 0,
        "steps": 6,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return SimpleNamespace(patcher=patcher, sampling=sampling, models=tmp_path / "models/dit_accel")


def node(name: str) -> Any:
    cls = NODE_CLASS_MAPPINGS[f"DitAccel{name}"]
    made = cls()
    return getattr(made, cls.FUNCTION)


@pytest.mark.parametrize("name", list(NODE_CLASS_MAPPINGS))
def test_declarations(name: str) -> None:
    """What ComfyUI reads agrees with what the function takes, and JSON can carry it."""
    cls = NODE_CLASS_MAPPINGS[name]
    assert cls.CATEGORY == "model/patch"
    assert NODE_DISPLAY_NAME_MAPPINGS[name].endswith("(dit_accel)")
    inputs = cls.INPUT_TYPES()
    json.dumps(inputs)
    declared = {key for kind in inputs.values() for key in kind}
    parameters = inspect.signature(getattr(cls, cls.FUNCTION)).parameters.values()
    named = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}
    assert named <= declared
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        assert named == declared
    assert len(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)) == len(cls.RETURN_TYPES)
    for kind in inputs.values():
        for spec in kind.values():
            if isinstance(spec[0], list):
                assert spec[1]["default"] in spec[0] if len(spec) > 1 and "default" in spec[1] else spec[0]


def test_accelerates(comfyui: SimpleNamespace) -> None:
    (fast,) = node("Accelerate")(model=comfyui.patcher, **CHOICES)
    sample(fast, torch.randn(1, 4, 2, 32, 32), [prompt(7, 128, 1)])
    report = node("Statistics")(model=fast, after=None)
    text, picture = report["result"]
    assert "8 of 10 calls sparse" in text
    assert report["ui"]["text"] == [text]
    assert picture.shape[0] == 1
    assert picture.unique().numel() > 3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dense_blocks": "x"}, "dense_blocks must be a list such as '0, 1, 47-49', got 'x'"),
        ({"dense_blocks": "1-2"}, "dense_blocks names 2, but WanModel has the blocks 0 to 1"),
        ({"start_percent": 0.9, "end_percent": 0.5}, "start_percent must be below end_percent"),
        ({"method": "paro"}, "run the Calibrate node once"),
        ({"method": "nothing"}, "unknown method 'nothing'"),
    ],
)
def test_user_errors(comfyui: SimpleNamespace, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError) as error:
        node("Accelerate")(model=comfyui.patcher, **{**CHOICES, **changes})
    assert part in str(error.value)


def test_errors_before_anything_is_loaded() -> None:
    validate = NODE_CLASS_MAPPINGS["DitAccelAccelerate"].VALIDATE_INPUTS  # type: ignore[attr-defined]
    assert validate(start_percent=0.2, end_percent=1.0, dense_blocks="0, 1") is True
    assert validate(start_percent=None, end_percent=0.1, dense_blocks=None) is True
    assert "start_percent must be below" in validate(start_percent=0.5, end_percent=0.1, dense_blocks="")
    assert "got 'x'" in validate(start_percent=0.2, end_percent=1.0, dense_blocks="x")


def test_unsupported_models(messages: pytest.LogCaptureFixture) -> None:
    patcher = Patcher(UNetModel(), "new")
    with pytest.raises(ValueError, match="UNetModel cannot be accelerated: it is a U-Net.*dense_if_unsupported"):
        node("Accelerate")(model=patcher, **CHOICES)
    (kept,) = node("Accelerate")(model=patcher, **CHOICES, dense_if_unsupported=True)
    assert kept.model_options == patcher.model_options
    assert not kept.wrappers
    assert "it stays dense" in messages.text


def test_calibrate_save_load_and_use(comfyui: SimpleNamespace) -> None:
    (profile,) = node("Calibrate")(
        model=comfyui.patcher, method="paro", quality="custom", density=0.5, **comfyui.sampling
    )
    assert profile.plan.model == "WanModel"
    assert profile.plan.head_choice.shape == (2, 2)
    (path,) = node("SaveProfile")(name="tiny", profile=profile)["result"]
    assert sorted(p.name for p in comfyui.models.iterdir()) == ["tiny.json", "tiny.safetensors"]
    assert Path(path) == comfyui.models / "tiny.json"
    (loaded,) = node("LoadProfile")(name="tiny")
    assert loaded.settings == profile.settings
    (fast,) = node("Accelerate")(model=comfyui.patcher, profile=loaded, **CHOICES)
    sample(fast, torch.randn(1, 4, 2, 32, 32), [prompt(7, 128, 1)], steps=6)
    (status,) = session_of(fast).status()
    assert (status.method, status.sparse_calls, status.plans) == ("paro", 12, 0)


def test_a_static_plan_keeps_its_window(comfyui: SimpleNamespace) -> None:
    (profile,) = node("Calibrate")(
        model=comfyui.patcher, method="paro", quality="custom", density=0.5, **comfyui.sampling
    )
    later = Profile(
        profile.model, profile.settings.from_dict({**profile.settings.to_dict(), "start_percent": 0.5}), profile.plan
    )
    (fast,) = node("Accelerate")(model=comfyui.patcher, profile=later, **CHOICES)
    sample(fast, torch.randn(1, 4, 2, 32, 32), [prompt(7, 128, 1)], steps=6)
    (status,) = session_of(fast).status()
    assert status.reasons == {"warm-up": 6}
    assert status.sparse_calls == 6


def test_profile_errors(comfyui: SimpleNamespace) -> None:
    (profile,) = node("Calibrate")(
        model=comfyui.patcher, method="paro", quality="method", density=0.5, **comfyui.sampling
    )
    flux = Patcher(Flux("new").eval(), "new")
    with pytest.raises(ValueError, match="made for WanModel, this model is Flux"):
        node("Accelerate")(model=flux, profile=profile, **CHOICES)
    with pytest.raises(ValueError, match="needs no calibration"):
        node("Calibrate")(model=flux, method="auto", quality="method", density=0.5, **comfyui.sampling)
    with pytest.raises(ValueError, match="no profile 'absent'"):
        node("LoadProfile")(name="absent")
    with pytest.raises(ValueError, match="not neither"):
        node("SaveProfile")(name="x")
    with pytest.raises(ValueError, match="not accelerated: connect the output of"):
        node("Statistics")(model=flux, after=None)


def test_settings_of_a_model_can_be_saved(comfyui: SimpleNamespace) -> None:
    (fast,) = node("Accelerate")(model=comfyui.patcher, **{**CHOICES, "dense_blocks": "1"})
    node("SaveProfile")(name="mine", model=fast)
    (loaded,) = node("LoadProfile")(name="mine")
    assert loaded.settings.dense_blocks == (1,)
    (again,) = node("Accelerate")(model=comfyui.patcher, profile=loaded, **CHOICES)
    assert session_of(again).settings == session_of(fast).settings


def test_compares_with_dense(comfyui: SimpleNamespace) -> None:
    (fast,) = node("Accelerate")(model=comfyui.patcher, **CHOICES)
    result = node("Compare")(model=fast, vae=Decoder(), gain=4.0, **comfyui.sampling)["result"]
    accelerated, dense, apart, report = result
    assert accelerated.shape == dense.shape == (2, 32, 32, 3)
    torch.testing.assert_close(apart, ((accelerated - dense).abs() * 4).clamp(0, 1))
    assert apart.max() > 0
    assert report.startswith("PSNR ")
    assert "8 of 12 calls sparse" in report
    (every,) = node("Accelerate")(model=comfyui.patcher, **{**CHOICES, "method": "dense"})
    same = node("Compare")(model=every, vae=Decoder(), gain=4.0, **comfyui.sampling)["result"]
    assert torch.equal(same[0], same[1])
    assert same[3].startswith("PSNR inf dB")


LOAD = """
import importlib.util, json, sys
path, before = sys.argv[1], list(sys.path)
spec = importlib.util.spec_from_file_location(path.replace(".", "_x_"), path + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
said = None
node = module.NODE_CLASS_MAPPINGS["DitAccelAccelerate"]
try:
    if len(sys.argv) > 2:
        getattr(node(), node.FUNCTION)(model=None)
except RuntimeError as error:
    said = str(error)
print(json.dumps({
    "outputs": {k: list(v.RETURN_TYPES) for k, v in module.NODE_CLASS_MAPPINGS.items()},
    "inputs": [sorted(v.INPUT_TYPES()) for v in module.NODE_CLASS_MAPPINGS.values()],
    "names": module.NODE_DISPLAY_NAME_MAPPINGS,
    "root": path in sys.path and path not in before,
    "comfy": [m for m in ("comfy", "nodes", "diffusers") if m in sys.modules],
    "said": said,
}))
"""


def load(clone: Path, cwd: Path, *more: str) -> dict[str, Any]:
    """Load a folder as ComfyUI does, in a process that knows nothing of this repository."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, str(clone), *more]
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_the_repository_is_a_custom_node(tmp_path: Path) -> None:
    found = load(ROOT, tmp_path)
    assert found["outputs"] == {name: list(cls.RETURN_TYPES) for name, cls in NODE_CLASS_MAPPINGS.items()}
    assert found["names"] == NODE_DISPLAY_NAME_MAPPINGS
    assert found["root"] is False  # or `tests` and `docs` would be importable; an editable install puts it there itself
    assert found["comfy"] == []


def test_a_broken_install_shows_in_the_node(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for part in ("dit_accel", "kernels", "patches"):
        (clone / part).mkdir(parents=True)
    (clone / "__init__.py").write_text((ROOT / "__init__.py").read_text())
    (clone / "dit_accel/__init__.py").write_text("import a_library_that_is_missing")
    found = load(clone, tmp_path, "run")
    assert found["outputs"] == {name: list(cls.RETURN_TYPES) for name, cls in NODE_CLASS_MAPPINGS.items()}
    assert found["names"] == NODE_DISPLAY_NAME_MAPPINGS
    assert "a_library_that_is_missing" in found["said"]
    assert "pip install -r" in found["said"]


def test_an_installed_package_becomes_a_custom_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert main([str(tmp_path)]) == 0
    (made,) = (tmp_path / "custom_nodes").iterdir()
    namespace: dict[str, Any] = {}
    exec(compile(made.read_text(), str(made), "exec"), namespace)
    assert namespace["NODE_CLASS_MAPPINGS"] == NODE_CLASS_MAPPINGS
