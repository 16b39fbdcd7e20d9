"""The nodes inside a real ComfyUI, driven through its HTTP interface with a tiny random Wan model.

Skipped unless ``COMFYUI_PATH`` names a checkout (the folder of ``main.py``); ``COMFYUI_PYTHON`` names the interpreter that
has its requirements, else this one is taken. Nothing is written into the checkout.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).absolute().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON") or sys.executable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH does not name a checkout of ComfyUI, see docs/comfyui.md"),
]

# ComfyUI recognises Wan by its weights: heads of 128, so one head here.
MODEL = """
import sys, torch
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], sys.argv[2], "--cpu"]
target = sys.argv.pop(1)
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file
torch.manual_seed(0)
model = WanModel(model_type="t2v", dim=256, ffn_dim=256, num_heads=2, num_layers=2,
                 operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.float32)
def fill(name, value):
    centre = 1.0 if "norm" in name and "weight" in name else 0.0
    return torch.randn(value.shape) * (0.05 if value.ndim > 1 else 0.1) + centre
save_file({name: fill(name, value) for name, value in model.state_dict().items()}, target)
"""

TEXT = """
import torch

class RandomText:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 8, 4096, generator=generator), {}]],)

NODE_CLASS_MAPPINGS = {"RandomText": RandomText}
"""


class Server:
    """One ComfyUI process with folders of its own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for name in ("models/diffusion_models", "custom_nodes", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "dit_accel").symlink_to(os.environ.get("DIT_ACCEL_CLONE", str(ROOT)))
        (base / "custom_nodes" / "random_text.py").write_text(TEXT)
        weights = str(base / "models/diffusion_models/tiny_wan.safetensors")
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([PYTHON, "-c", MODEL, COMFYUI, weights], env=env, check=True, timeout=300)
        self.log = (base / "log.txt").open("w")
        command = [PYTHON, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(base)]
        self.process = subprocess.Popen(command, cwd=COMFYUI, env=env, stdout=self.log, stderr=subprocess.STDOUT)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def wait(self, limit_s: float = 240) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.base / "log.txt").read_text()[-4000:]
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError((self.base / "log.txt").read_text()[-4000:])

    def post(self, graph: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def run(self, graph: dict[str, Any], limit_s: float = 240) -> dict[str, Any]:
        """The history entry of a prompt, once it is done or has failed."""
        posted = self.post(graph)
        assert "prompt_id" in posted, posted
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            history = self.get(f"/history/{posted['prompt_id']}")
            if history:
                return dict(history[posted["prompt_id"]])
            time.sleep(0.3)
        raise TimeoutError((self.base / "log.txt").read_text()[-4000:])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("comfyui"))
    try:
        made.wait()
        yield made
    finally:
        made.process.terminate()
        made.process.wait(30)
        made.log.close()


def accelerate(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["1", 0],
        "method": "auto",
        "quality": "custom",
        "density": 1.0,
        "precision": "model",
        "start_percent": 0.2,
        "end_percent": 1.0,
        "dense_blocks": "",
        "min_tokens": 0,
        "block_size": "auto",
        "verbose": True,
        **changes,
    }
    return {"class_type": "DitAccelAccelerate", "inputs": inputs}


def graph(name: str, node: dict[str, Any] | None) -> dict[str, Any]:
    """Sample 768 tokens with the tiny model and save the latent."""
    sampler = {
        "model": ["1" if node is None else "2", 0],
        "positive": ["3", 0],
        "negative": ["4", 0],
        "latent_image": ["5", 0],
        "seed": 7,
        "steps": 5,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    made = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"}},
        "3": {"class_type": "RandomText", "inputs": {"seed": 1}},
        "4": {"class_type": "RandomText", "inputs": {"seed": 2}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 256, "height": 256, "length": 9, "batch_size": 1},
        },
        "6": {"class_type": "KSampler", "inputs": sampler},
        "7": {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": name}},
    }
    if node is not None:
        made["2"] = node
        made["8"] = {"class_type": "DitAccelStatistics", "inputs": {"model": ["2", 0], "after": ["6", 0]}}
        made["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 1]}}
    return made


def latent(server: Server, name: str) -> torch.Tensor:
    (path,) = (server.base / "output").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


def done(history: dict[str, Any]) -> dict[str, Any]:
    assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1, default=str)[-3000:]
    return dict(history["outputs"])


def failure(history: dict[str, Any]) -> str:
    return str(next(m for m in history["status"]["messages"] if m[0] == "execution_error")[1]["exception_message"])


def test_nodes_are_there(server: Server) -> None:
    info = server.get("/object_info")
    for name in ("Accelerate", "LoadProfile", "SaveProfile", "Calibrate", "Statistics", "Compare"):
        node = info[f"DitAccel{name}"]
        assert node["category"] == "model/patch"
        assert node["python_module"] == "custom_nodes.dit_accel"
    assert "auto" in info["DitAccelAccelerate"]["input"]["required"]["method"][0]


def test_samples_and_reports(server: Server) -> None:
    done(server.run(graph("dense", None)))
    (text,) = done(server.run(graph("all", accelerate())))["8"]["text"]
    assert "WanModel: auto" in text
    assert "3x16x16" in text
    assert "(16 of 20 calls sparse" in text or "(8 of 10 calls sparse" in text  # conditionings split or batched
    done(server.run(graph("some", accelerate(density=0.3))))
    dense, every, some = (latent(server, name) for name in ("dense", "all", "some"))
    assert torch.isfinite(dense).all()
    torch.testing.assert_close(every, dense, rtol=1e-3, atol=1e-3)
    assert (some - dense).abs().max() > 1e-3


def test_core_nodes_beside_it(server: Server) -> None:
    """Another override and a compiled model around the node."""
    before, info = graph("beside", accelerate()), server.get("/object_info")
    before["10"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["2", 0], "shift": 5.0}}
    before["6"]["inputs"]["model"] = ["10", 0]
    if "ModelAttentionBackend" in info:
        choices = info["ModelAttentionBackend"]["input"]["required"]
        inputs = {name: spec[0][0] if isinstance(spec[0], list) else ["10", 0] for name, spec in choices.items()}
        before["11"] = {"class_type": "ModelAttentionBackend", "inputs": inputs}
        before["6"]["inputs"]["model"] = ["11", 0]
    (text,) = done(server.run(before))["8"]["text"]
    assert "sparse at" in text
    assert "0 of" not in text


def test_calibrates_saves_and_loads_a_profile(server: Server) -> None:
    sampler = graph("x", None)["6"]["inputs"]
    made = graph("unused", None)
    del made["6"], made["7"]
    made["2"] = {
        "class_type": "DitAccelCalibrate",
        "inputs": {**sampler, "method": "paro", "quality": "custom", "density": 0.5},
    }
    made["3"]["inputs"]["seed"] = 1
    made["10"] = {"class_type": "DitAccelSaveProfile", "inputs": {"name": "tiny", "profile": ["2", 0]}}
    (text,) = done(server.run(made))["10"]["text"]
    assert "WanModel: paro" in text
    assert (server.base / "models/dit_accel/tiny.safetensors").is_file()
    used = graph("profile", accelerate(profile=["12", 0]))
    used["12"] = {"class_type": "DitAccelLoadProfile", "inputs": {"name": "tiny"}}
    (text,) = done(server.run(used))["8"]["text"]
    assert "WanModel: paro" in text
    assert "sparse at" in text


def test_errors_say_what_to_change(server: Server) -> None:
    refused = server.post(graph("bad", accelerate(dense_blocks="0, x")))
    told = json.dumps(refused["node_errors"])
    assert "dense_blocks must be a list such as" in told
    told = json.dumps(server.post(graph("bad", accelerate(start_percent=0.9, end_percent=0.1)))["node_errors"])
    assert "start_percent must be below end_percent" in told
    assert "needs a profile" in failure(server.run(graph("bad", accelerate(method="paro"))))
    assert "has the blocks 0 to 1" in failure(server.run(graph("bad", accelerate(dense_blocks="5"))))


def test_real_models_of_every_family() -> None:
    """Tiny random models of ComfyUI itself: everything visual is sparse, and exact at density 1."""
    script = Path(__file__).with_name("real_models.py")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHON, str(script), COMFYUI, str(ROOT / "kernels"), str(ROOT / "patches"), str(ROOT)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    built = {name: entry for name, entry in found.items() if "unbuilt" not in entry}
    assert {"wan", "flux"} <= set(built), found  # the constructors of others may differ from version to version
    calls = {"wan_reference": 1, "lumina": 3, "z_image": 3, "aura": 3}
    for name, entry in built.items():
        assert entry["error"] < 1e-5, (name, entry)
        assert entry["sparse"] == calls.get(name, 2), (name, entry)
        assert entry["reasons"] == [], (name, entry)
