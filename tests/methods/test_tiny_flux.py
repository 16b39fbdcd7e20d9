"""The trained tiny FLUX: its size, its pictures, and acceleration of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel_eval.generate import generate

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
TINY_FLUX = ROOT / "examples/tiny_flux"
CALL: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 128}
TOKENS = 32 * 32


@pytest.fixture(scope="module")
def pipe() -> Any:
    from dit_accel_eval.pipelines import load_pipeline

    return load_pipeline(TINY_FLUX)


def _picture(pipe: Any, prompt: str, seed: int = 0, **call: Any) -> np.ndarray[Any, Any]:
    return generate(pipe, [prompt], [seed], **{**CALL, **call}).frames[0, 0]


def _psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean()))


def test_it_is_small_enough_to_ship() -> None:
    weights = list(TINY_FLUX.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert sum(path.stat().st_size for path in weights) <= 16 * 2**20
    assert all(path.stat().st_size <= 16 * 2**20 for path in TINY_FLUX.rglob("*"))


def test_its_native_picture_has_as_many_tokens_as_flux(pipe: Any) -> None:
    """What the pipeline asks for when it is told nothing: 64 x 64 tokens of picture, of 16 numbers each."""
    size = pipe.default_sample_size * pipe.vae_scale_factor
    latents, places = pipe.prepare_latents(1, 4, size, size, torch.float32, torch.device("cpu"), None)
    assert size == 256
    assert latents.shape == (1, 4096, pipe.transformer.config.in_channels)
    assert places.shape == (4096, 3)


def test_a_seed_gives_one_picture(pipe: Any) -> None:
    first = _picture(pipe, "a small red circle on a white background")
    assert np.array_equal(first, _picture(pipe, "a small red circle on a white background"))
    assert _psnr(first, _picture(pipe, "a small red circle on a white background", seed=1)) < 30


@pytest.mark.parametrize(("colour", "strong", "weak"), [("red", 0, 2), ("blue", 2, 0), ("green", 1, 0)])
def test_the_prompt_decides(colour: str, strong: int, weak: int, pipe: Any) -> None:
    """Backgrounds are pale: red is mixed with a third of white."""
    picture = _picture(pipe, f"a small white circle on a {colour} background", num_inference_steps=6)
    edge = np.concatenate([picture[:8].reshape(-1, 3), picture[-8:].reshape(-1, 3)]).mean(0)
    assert edge[strong] > edge[weak] + 40, edge


def test_accelerated_it_shows_the_same_picture(pipe: Any) -> None:
    prompt = "four equal blue blobs on a yellow background"
    before = {name: id(module) for name, module in pipe.transformer.named_modules()}
    dense = _picture(pipe, prompt, num_inference_steps=8)
    with dit_accel.enable(pipe, "auto", density=0.5, min_tokens=0) as handle:
        sparse = _picture(pipe, prompt, num_inference_steps=8)
        (status,) = handle.stats().values()
    assert status.sparse_calls > 0, status.reasons
    assert status.density < 1
    assert not np.array_equal(sparse, dense)
    assert _psnr(sparse, dense) > _psnr(_picture(pipe, prompt, seed=5, num_inference_steps=8), dense) + 5
    assert np.array_equal(_picture(pipe, prompt, num_inference_steps=8), dense)
    assert {name: id(module) for name, module in pipe.transformer.named_modules()} == before


def test_text_is_always_exact(pipe: Any) -> None:
    """With almost nothing of the picture kept, the work is that of the text and little more."""
    with dit_accel.enable(pipe, "bra", density=0.1, warmup=0.0, min_tokens=0) as handle:
        _picture(pipe, "a small red circle on a white background")
        (status,) = handle.stats().values()
    text = 1 - (TOKENS / (TOKENS + 128)) ** 2
    assert text < status.density < 0.45


def test_the_prompts_are_of_the_grammar() -> None:
    sys.path.insert(0, str(ROOT / "examples/tiny_flux_training"))
    try:
        from scenes import vocabulary
    finally:
        sys.path.pop(0)
    known = {word for sentence in vocabulary(1500) for word in sentence.split()}
    prompts = (TINY_FLUX / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 32
    assert {word for prompt in prompts for word in prompt.split()} <= known
