"""Where each family's tokens sit, checked against the order of tokens in ComfyUI's models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.comfyui.families import FAMILIES, Family, find_family
from dit_accel_patches.comfyui.layouts import Layout


def model(name: str, base: str | None = None, **attributes: Any) -> Any:
    """An object whose class has a name of ComfyUI's, and the forward signature of all these models in common."""

    def forward(
        self: Any, x: Any, timestep: Any, context: Any = None, transformer_options: Any = None, **kw: Any
    ) -> None:
        """Never called."""

    bases = (type(base, (), {"forward": forward}),) if base else ()
    made = type(name, bases, {"forward": forward})()
    made.__dict__.update(attributes)
    return made


def layout(made: Any, latent: Any, text: int = 0, **kwargs: Any) -> Layout | str:
    family = find_family(made)
    assert isinstance(family, Family), family
    return family.read(made, (latent, torch.ones(1), torch.zeros(1, text, 8)), kwargs)


def latent(*sizes: int) -> Tensor:
    return torch.zeros(1, 4, *sizes)


CASES: list[tuple[str, Any, Any, dict[str, Any], int, TokenGeometry]] = [
    ("Wan, odd size", model("WanModel", patch_size=(1, 2, 2)), latent(3, 7, 12), {}, 72, TokenGeometry((3, 4, 6))),
    (
        "Wan, reference in front",
        model("WanModel", patch_size=(1, 2, 2), ref_conv=object()),
        latent(3, 8, 12),
        {"reference_latent": latent(8, 12)},
        96,
        TokenGeometry((3, 4, 6), 24, 0),
    ),
    (
        "Wan, context references behind",
        model("WanModel", patch_size=(1, 2, 2), ref_conv=None),
        latent(3, 8, 12),
        {"context_latents": [latent(1, 8, 12)]},
        96,
        TokenGeometry((3, 4, 6), 0, 24),
    ),
    (
        "Wan, frames appended",
        model("VaceWanModel", "WanModel", patch_size=(1, 2, 2)),
        latent(3, 8, 12),
        {"time_dim_concat": latent(1, 8, 12)},
        96,
        TokenGeometry((4, 4, 6)),
    ),
    (
        "LTX",
        model("LTXVModel", patchifier=SimpleNamespace(patch_size=(1, 1, 1))),
        latent(3, 4, 5),
        {},
        60,
        TokenGeometry((3, 4, 5)),
    ),
    (
        "LTX, video and sound, guide frames that were filtered",
        model("LTXAVModel", patchifier=SimpleNamespace(patch_size=(1, 1, 1))),
        [latent(4, 4, 5), torch.zeros(1, 8, 30)],
        {"keyframe_idxs": torch.zeros(1, 3, 20, 2)},
        67,
        TokenGeometry((3, 4, 5), 0, 7),
    ),
    (
        "Cosmos",
        model("GeneralDIT", patch_spatial=2, patch_temporal=1),
        latent(3, 8, 12),
        {},
        72,
        TokenGeometry((3, 4, 6)),
    ),
    (
        "Anima",
        model("Anima", "MiniTrainDIT", patch_spatial=2, patch_temporal=1),
        latent(1, 9, 12),
        {},
        30,
        TokenGeometry((1, 5, 6)),
    ),
    (
        "HunyuanVideo, every text behind",
        model("HunyuanVideo", patch_size=[1, 2, 2]),
        latent(3, 8, 12),
        {"text": 11},
        90,
        TokenGeometry((3, 4, 6), 0, 18),
    ),
    (
        "HunyuanVideo, reference in front",
        model("HunyuanVideo", patch_size=[1, 2, 2]),
        latent(3, 8, 12),
        {"text": 11, "ref_latent": latent(1, 8, 12)},
        107,
        TokenGeometry((3, 4, 6), 24, 11),
    ),
    (
        "HunyuanImage",
        model("HunyuanVideo", patch_size=[2, 2]),
        latent(8, 12),
        {"text": 11},
        35,
        TokenGeometry((1, 4, 6), 0, 11),
    ),
    ("FLUX", model("Flux", patch_size=2), latent(8, 11), {"text": 11}, 35, TokenGeometry((1, 4, 6), 11, 0)),
    (
        "FLUX Kontext",
        model("Flux", patch_size=2),
        latent(8, 12),
        {"text": 11, "ref_latents": [latent(8, 8), latent(5, 4)]},
        57,
        TokenGeometry((1, 4, 6), 11, 22),
    ),
    (
        "Chroma radiance",
        model("ChromaRadiance", "Chroma", patch_size=16),
        latent(64, 96),
        {"text": 9},
        33,
        TokenGeometry((1, 4, 6), 9, 0),
    ),
    (
        "Qwen-Image edit",
        model("QwenImageTransformer2DModel", patch_size=2),
        latent(1, 8, 12),
        {"text": 11, "ref_latents": [latent(1, 8, 8)]},
        51,
        TokenGeometry((1, 4, 6), 11, 16),
    ),
    (
        "Lumina 2, both",
        model("NextDiT", patch_size=2),
        latent(8, 12),
        {"text": 11},
        35,
        TokenGeometry((1, 4, 6), 11, 0),
    ),
    ("Lumina 2, refiner", model("NextDiT", patch_size=2), latent(8, 12), {"text": 11}, 24, TokenGeometry((1, 4, 6))),
    (
        "Z-Image, padded",
        model("NextDiT", patch_size=2, pad_tokens_multiple=32),
        latent(8, 12),
        {"text": 33},
        96,
        TokenGeometry((1, 4, 6), 64, 8),
    ),
    (
        "Z-Image, refiner",
        model("NextDiT", patch_size=2, pad_tokens_multiple=32),
        latent(8, 12),
        {"text": 33},
        32,
        TokenGeometry((1, 4, 6), 0, 8),
    ),
    (
        "HiDream edit",
        model("HiDreamImageTransformer2DModel", patch_size=2),
        latent(8, 12),
        {"image_cond": latent(8, 12)},
        55,
        TokenGeometry((1, 4, 12), 0, 7),
    ),
    (
        "AuraFlow",
        model("MMDiT", patch_size=2, register_tokens=torch.zeros(1, 8, 16)),
        latent(8, 12),
        {"text": 11},
        43,
        TokenGeometry((1, 4, 6), 19, 0),
    ),
]


@pytest.mark.parametrize(
    ("made", "x", "kwargs", "tokens", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_geometry(made: Any, x: Any, kwargs: dict[str, Any], tokens: int, expected: TokenGeometry) -> None:
    found = layout(made, x, **kwargs)
    assert isinstance(found, Layout), found
    assert found.geometry(tokens) == expected
    assert found.geometry(3) is None  # text or sound alone


def test_every_family_is_covered() -> None:
    covered = {find_family(case[1]).name for case in CASES}  # type: ignore[union-attr]
    assert covered == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    ("made", "x", "kwargs", "reason"),
    [
        (
            model("Flux", patch_size=2),
            latent(8, 12),
            {"transformer_options": {"patches": {"post_input": [1]}}},
            "post_input",
        ),
        (model("NextDiT", patch_size=2), latent(8, 12), {"ref_latents": [latent(8, 8)]}, "omni"),
        (model("WanModel", patch_size=(1, 2, 2)), [[]], {}, "is list, not a tensor"),
        (model("WanModel"), latent(3, 8, 12), {}, "the patch size of WanModel is not known"),
        (model("Flux", patch_size=2), torch.zeros(1, 4, 8), {}, "the latent must be"),
        (
            model("LTXVModel", patch_size=1),
            latent(1, 4, 5),
            {"keyframe_idxs": torch.zeros(1, 3, 20, 2)},
            "leave no frame",
        ),
    ],
)
def test_reasons(made: Any, x: Any, kwargs: dict[str, Any], reason: str) -> None:
    found = layout(made, x, **kwargs)
    assert isinstance(found, str)
    assert reason in found


def test_unexpected_length_is_a_reason() -> None:
    found = Layout((1, 4, 6), 11, 22).geometry(58)
    assert isinstance(found, str)
    assert "58 tokens, expected 11 + 24 + 22" in found


@pytest.mark.parametrize(
    ("made", "part"),
    [
        (model("OpenAISignatureMMDITWrapper", "MMDiT"), "no hook"),
        (model("UNetModel"), "U-Net"),
        (model("SomethingNew"), "known are Wan 2.1 / 2.2"),
    ],
)
def test_models_that_stay_dense(made: Any, part: str) -> None:
    found = find_family(made)
    assert isinstance(found, str)
    assert part in found
