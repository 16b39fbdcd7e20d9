"""Profile ``official``: the networks of VBench, loaded from where the user has them and never downloaded.

Weights are looked for where VBench itself keeps them (``VBENCH_CACHE_DIR`` or ``~/.cache/vbench``), in torch.hub's folder
and in Hugging Face's cache. Checkpoints are read with ``weights_only=True``. RAFT, AMT and ViCLIP need the code of the
package ``vbench``, MUSIQ that of ``pyiqa``; neither is a dependency.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel_eval.extractors.cache import MissingExtractorError
from dit_accel_eval.vbench.formulas import Flow, Frames, Interpolate, middle_frames
from dit_accel_eval.vbench.pictures import clip_input, dino_input, musiq_input, to_planes
from dit_accel_eval.vbench.slots import Slot

__all__ = ["SLOTS", "missing_model", "vbench_cache"]

_BATCH = 32
_DINO, _CLIP_B, _CLIP_L = "facebook/dino-vitb16", "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
_DINO_FILE = "dino_vitbase16_pretrain.pth"
_HEAD = "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
_MUSIQ = "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"
_AMT = "amt_model/amt-s.pth"
_RAFT = "raft_model/models/raft-things.pth"
_VICLIP = "ViCLIP/ViClip-InternVid-10M-FLT.pth"
_VOCABULARY = "ViCLIP/bpe_simple_vocab_16e6.txt.gz"


def vbench_cache() -> Path:
    """Where VBench keeps its weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def _no_file(*names: str) -> str | None:
    for name in names:
        if not (vbench_cache() / name).is_file():
            return f"{vbench_cache() / name} is absent; VBench fetches it at its first run"
    return None


def _no_package(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"the package {name!r}, which holds the network's code, is not installed"
    return None


def missing_model(repo: str) -> str | None:
    """Why a model cannot be loaded from Hugging Face's cache, ``None`` if it is there."""
    try:
        from transformers.utils import cached_file
    except ImportError as error:
        return f"transformers cannot be imported ({error})"
    try:
        cached_file(repo, "config.json", local_files_only=True)
    except OSError:
        return f"{repo} is not in Hugging Face's cache; fetch it with `hf download {repo}`"
    return None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # such packages fail in many ways
        raise MissingExtractorError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MissingExtractorError(f"{path} cannot be read as plain weights: {error}") from error


def _pretrained(kind: str, repo: str, device: str, **options: Any) -> Any:
    model = getattr(_module("transformers"), kind)
    try:
        return model.from_pretrained(repo, local_files_only=True, **options).eval().requires_grad_(False).to(device)
    except OSError as error:
        raise MissingExtractorError(f"{repo} cannot be loaded from Hugging Face's cache: {error}") from error


def _in_parts(frames: Frames, device: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([encode(part) for part in to_planes(frames, device).split(_BATCH)])


def _dino_hub() -> tuple[Path, Path] | None:
    """DINO's code and weights as VBench or torch.hub leave them."""
    hub, own = Path(torch.hub.get_dir()), vbench_cache() / "dino_model"
    for code, weights in (
        (own / "facebookresearch_dino_main", own / _DINO_FILE),
        (hub / "facebookresearch_dino_main", hub / "checkpoints" / _DINO_FILE),
    ):
        if (code / "hubconf.py").is_file() and weights.is_file():
            return code, weights
    return None


def _dino_missing() -> str | None:
    if _dino_hub() is not None:
        return None
    reason = missing_model(_DINO)
    return None if reason is None else f"neither VBench nor torch.hub has kept {_DINO_FILE}, and {reason}"


def _dino(device: str) -> Callable[[Frames], Tensor]:
    found = _dino_hub()
    if found is not None:
        code, weights = found
        net: Any = torch.hub.load(str(code), "dino_vitb16", source="local", pretrained=False)
        net.load_state_dict(_checkpoint(weights))
        net = net.eval().to(device)
        return lambda frames: _in_parts(frames, device, lambda part: net(dino_input(part)))
    vit = _pretrained("ViTModel", _DINO, device, add_pooling_layer=False)

    def encode(part: Tensor) -> Tensor:
        hidden: Tensor = vit(dino_input(part), interpolate_pos_encoding=True).last_hidden_state
        return hidden[:, 0]

    return lambda frames: _in_parts(frames, device, encode)


def _clip(repo: str) -> Callable[[str], Callable[[Frames], Tensor]]:
    def load(device: str) -> Callable[[Frames], Tensor]:
        model = _pretrained("CLIPVisionModelWithProjection", repo, device)
        return lambda frames: _in_parts(frames, device, lambda part: model(clip_input(part)).image_embeds.float())

    return load


def _aesthetic(device: str) -> Callable[[Frames], float]:
    encode = _clip(_CLIP_L)(device)
    state = _checkpoint(vbench_cache() / _HEAD)
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(state)
    head = head.to(device)

    def assess(frames: Frames) -> float:
        with torch.inference_mode():
            return float(head(F.normalize(encode(frames), dim=-1)).mean())

    return assess


def _musiq(device: str) -> Callable[[Frames], float]:
    net = _module("pyiqa.archs.musiq_arch").MUSIQ(pretrained=False)
    state = _checkpoint(vbench_cache() / _MUSIQ)
    net.load_state_dict(state.get("params", state))
    net = net.eval().to(device)

    def assess(frames: Frames) -> float:
        with torch.inference_mode():
            return float(np.mean([float(net(musiq_input(to_planes(frame[None], device)))) for frame in frames]))

    return assess


def _padded(planes: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Repeat the border evenly on both sides; also where the picture begins."""
    height, width = planes.shape[2:]
    tall, wide = -height % multiple, -width % multiple
    pads = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
    return F.pad(planes, pads, mode="replicate"), (tall // 2, wide // 2)


def _amt(device: str) -> Interpolate:
    net = _module("vbench.third_party.amt.networks.AMT-S").Model(corr_radius=3, corr_lvls=4, num_flows=3)
    net.load_state_dict(_checkpoint(vbench_cache() / _AMT)["state_dict"])
    net = net.eval().to(device)
    time = torch.full((1, 1, 1, 1), 0.5, device=device)

    def middle(a: Frames, b: Frames) -> Frames:
        planes, (top, left) = _padded(to_planes(np.stack([a, b]), device).float() / 255, 16)
        with torch.inference_mode():
            found = net(planes[:1], planes[1:], time, scale_factor=1.0, eval=True)["imgt_pred"]
        found = found[0, :, top : top + a.shape[0], left : left + a.shape[1]]
        frame: Frames = (found * 255).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()  # cut off, not rounded
        return frame

    return middle


def _raft(device: str) -> Flow:
    options = argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)
    net = _module("vbench.third_party.RAFT.core.raft").RAFT(options)
    state = _checkpoint(vbench_cache() / _RAFT)
    net.load_state_dict({key.replace("module.", ""): value for key, value in state.items()})
    net = net.eval().to(device)

    def flow(a: Frames, b: Frames) -> np.ndarray[Any, np.dtype[np.float32]]:
        planes, (top, left) = _padded(to_planes(np.stack([a, b]), device).float(), 8)
        with torch.inference_mode():
            _, found = net(planes[:1], planes[1:], iters=20, test_mode=True)
        found = found[0, :, top : top + a.shape[0], left : left + a.shape[1]]
        lengths: np.ndarray[Any, np.dtype[np.float32]] = found.permute(1, 2, 0).float().cpu().numpy()
        return lengths

    return flow


def _viclip(device: str) -> Callable[[Frames, str], float]:
    tokenizer = _module("vbench.third_party.ViCLIP.simple_tokenizer").SimpleTokenizer(str(vbench_cache() / _VOCABULARY))
    net = _module("vbench.third_party.ViCLIP.viclip").ViCLIP(tokenizer=tokenizer, pretrain=None)
    net.load_state_dict(_checkpoint(vbench_cache() / _VICLIP)["model"])
    net = net.eval().to(device)

    def likeness(frames: Frames, prompt: str) -> float:
        chosen = clip_input(to_planes(frames[middle_frames(len(frames), 8)], device))
        with torch.inference_mode():
            video = F.normalize(net.encode_vision(chosen[None], test=True).float(), dim=-1)
            text = F.normalize(net.encode_text(prompt).float(), dim=-1)
        return float((video @ text.T)[0, 0])

    return likeness


#: Extractor of each dimension that needs one.
SLOTS: dict[str, Slot] = {
    "subject_consistency": Slot("dino-vitb16", _dino, _dino_missing),
    "background_consistency": Slot("clip-vit-b32", _clip(_CLIP_B), lambda: missing_model(_CLIP_B)),
    "motion_smoothness": Slot("amt-s", _amt, lambda: _no_file(_AMT) or _no_package("vbench")),
    "dynamic_degree": Slot("raft-things", _raft, lambda: _no_file(_RAFT) or _no_package("vbench")),
    "aesthetic_quality": Slot("laion-aesthetic-vit-l14", _aesthetic, lambda: _no_file(_HEAD) or missing_model(_CLIP_L)),
    "imaging_quality": Slot("musiq-spaq", _musiq, lambda: _no_file(_MUSIQ) or _no_package("pyiqa")),
    "overall_consistency": Slot(
        "viclip-internvid-10m-flt", _viclip, lambda: _no_file(_VICLIP, _VOCABULARY) or _no_package("vbench")
    ),
}
