"""The official profile: what is absent is said and never fetched; what is there is loaded and used as VBench does."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from dit_accel_eval import vbench
from dit_accel_eval.extractors import MissingExtractorError
from dit_accel_eval.vbench import official, pictures


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """No weights anywhere."""
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "vbench"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in ("_DINO", "_CLIP_B", "_CLIP_L"):
        monkeypatch.setattr(official, name, str(tmp_path / name))
    vbench._loaded.cache_clear()
    yield tmp_path
    vbench._loaded.cache_clear()


def frames(count: int = 4, height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def test_everything_absent_is_said(empty) -> None:
    for name, slot in official.SLOTS.items():
        reason = vbench.available(name, "official")
        assert reason, name
        with pytest.raises(ValueError, match=f"{name} cannot be measured under profile 'official'"):
            vbench.evaluate(frames(), prompt="a", profile="official", dimensions=[name])
        assert slot.id
    assert vbench.evaluate(frames(), profile="official").keys() == {"temporal_flickering"}
    assert not (empty / "vbench").exists()


class Colours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * self.scale


HUBCONF = """
import torch
dependencies = ["torch"]
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
    def forward(self, x):
        return x.mean((2, 3)) * self.scale
def dino_vitb16(pretrained=True):
    assert not pretrained, "would download"
    return Net()
"""


def test_dino_from_torch_hub(empty) -> None:
    code = empty / "hub" / "facebookresearch_dino_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUBCONF)
    save(empty / "hub" / "checkpoints" / "dino_vitbase16_pretrain.pth", {"scale": torch.tensor([1.0, 2.0, 3.0])})
    assert vbench.available("subject_consistency", "official") is None
    clip = frames()
    found = vbench.evaluate(clip, profile="official", dimensions=["subject_consistency"])
    x = pictures.dino_input(pictures.to_planes(clip)).mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0])
    assert found["subject_consistency"] == pytest.approx(vbench.formulas.consistency(x))


def test_dino_and_clip_from_hugging_face(empty, monkeypatch) -> None:
    """Tiny models with random weights stand for the real ones."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**size, image_size=224, patch_size=56), add_pooling_layer=False).eval()
    vit.save_pretrained(official._DINO)
    clip_model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**size, image_size=224, patch_size=56, projection_dim=8)
    ).eval()
    clip_model.save_pretrained(official._CLIP_B)
    slot = vbench.slots.Slot("clip", official._clip(official._CLIP_B), lambda: official.missing_model(official._CLIP_B))
    monkeypatch.setitem(official.SLOTS, "background_consistency", slot)
    clip = frames()
    found = vbench.evaluate(clip, profile="official", dimensions=["subject_consistency", "background_consistency"])
    planes = pictures.to_planes(clip)
    with torch.inference_mode():
        dino = vit(pictures.dino_input(planes), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        embeds = clip_model(pictures.clip_input(planes)).image_embeds
    assert found["subject_consistency"] == pytest.approx(vbench.formulas.consistency(dino), abs=1e-6)
    assert found["background_consistency"] == pytest.approx(vbench.formulas.consistency(embeds), abs=1e-6)


def test_aesthetic_head(empty, monkeypatch) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**size, image_size=224, patch_size=56, projection_dim=8)
    ).eval()
    model.save_pretrained(official._CLIP_L)
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    save(empty / "vbench" / official._HEAD, {"weight": weight, "bias": torch.tensor([5.0])})
    clip = frames(2)
    found = vbench.evaluate(clip, profile="official", dimensions=["aesthetic_quality"])
    with torch.inference_mode():
        embeds = model(pictures.clip_input(pictures.to_planes(clip))).image_embeds
        want = (nn.functional.normalize(embeds, dim=-1) @ weight.T + 5).mean() / 10
    assert found["aesthetic_quality"] == pytest.approx(float(want), abs=1e-6)


def package(monkeypatch, **modules) -> None:
    """Put modules where the packages ``vbench`` and ``pyiqa`` would have theirs."""
    for top in ("vbench", "pyiqa"):
        root = types.ModuleType(top)
        root.__spec__ = importlib.machinery.ModuleSpec(top, None, is_package=True)
        monkeypatch.setitem(sys.modules, top, root)
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", ".").replace("AMTS", "AMT-S"), module)


class Raft(Colours):
    def __init__(self, options) -> None:
        super().__init__()
        assert "small" in options

    def forward(self, a, b, *, iters: int, test_mode: bool):
        assert (iters, test_mode) == (20, True)
        assert a.shape[2] % 8 == a.shape[3] % 8 == 0
        assert float(a.max()) > 1  # 0 to 255
        return None, torch.full((1, 2, *a.shape[2:]), 99.0)


class Amt(Colours):
    def __init__(self, **options) -> None:
        super().__init__()
        assert options == {"corr_radius": 3, "corr_lvls": 4, "num_flows": 3}

    def forward(self, a, b, time, *, scale_factor, eval):
        assert a.shape[2] % 16 == a.shape[3] % 16 == 0
        return {"imgt_pred": (a + b) / 2}


def test_raft_and_amt_with_the_users_package(empty, monkeypatch) -> None:
    package(
        monkeypatch,
        vbench__third_party__RAFT__core__raft={"RAFT": Raft},
        vbench__third_party__amt__networks__AMTS={"Model": Amt},
    )
    save(empty / "vbench" / official._RAFT, {"module.scale": torch.ones(3)})
    save(empty / "vbench" / official._AMT, {"state_dict": {"scale": torch.ones(3)}})
    clip = frames(5, 41, 53)
    found = vbench.evaluate(clip, profile="official", dimensions=["motion_smoothness", "dynamic_degree"])
    guesses = [(clip[i].astype(int) + clip[i + 2]) // 2 for i in (0, 2)]
    errors = [np.abs(guess - clip[i]).mean() for guess, i in zip(guesses, (1, 3))]
    assert found["motion_smoothness"] == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-4)
    assert found["dynamic_degree"] == 1


class Musiq(Colours):
    def __init__(self, *, pretrained: bool) -> None:
        super().__init__()
        assert not pretrained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        return x.mean() * 100


class Viclip(Colours):
    def __init__(self, *, tokenizer, pretrain) -> None:
        super().__init__()
        assert pretrain is None

    def encode_vision(self, x, *, test: bool):
        assert x.shape == (1, 8, 3, 224, 224)
        return torch.tensor([[3.0, 4.0]])

    def encode_text(self, text: str):
        return torch.tensor([[float(len(text)), 0.0]])


def test_musiq_and_viclip_with_the_users_packages(empty, monkeypatch) -> None:
    package(
        monkeypatch,
        pyiqa__archs__musiq_arch={"MUSIQ": Musiq},
        vbench__third_party__ViCLIP__viclip={"ViCLIP": Viclip},
        vbench__third_party__ViCLIP__simple_tokenizer={"SimpleTokenizer": str},
    )
    save(empty / "vbench" / official._MUSIQ, {"params": {"scale": torch.ones(3)}})
    save(empty / "vbench" / official._VICLIP, {"model": {"scale": torch.ones(3)}})
    (empty / "vbench" / official._VOCABULARY).write_bytes(b"")
    clip = frames()
    found = vbench.evaluate(
        clip, prompt="abc", profile="official", dimensions=["imaging_quality", "overall_consistency"]
    )
    assert found["imaging_quality"] == pytest.approx(clip.mean() / 255, abs=1e-5)
    assert found["overall_consistency"] == pytest.approx(0.6)


def test_a_checkpoint_that_is_no_plain_data(empty, monkeypatch) -> None:
    package(monkeypatch, vbench__third_party__RAFT__core__raft={"RAFT": Raft})
    path = empty / "vbench" / official._RAFT
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.raises(MissingExtractorError, match=r"raft-things\.pth cannot be read as plain weights"):
        vbench.evaluate(frames(), profile="official", dimensions=["dynamic_degree"])


def test_a_package_that_does_not_import(empty, monkeypatch) -> None:
    package(monkeypatch)
    save(empty / "vbench" / official._AMT, {"state_dict": {}})
    with pytest.raises(MissingExtractorError, match=r"vbench\.third_party\.amt\.networks\.AMT-S cannot be imported"):
        vbench.evaluate(frames(), profile="official", dimensions=["motion_smoothness"])
