"""Extractors of the distribution metrics by profile; a caller may bring others in the same form."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel_eval.extractors import cache, efficientnet
from dit_accel_eval.metrics import drift
from dit_accel_eval.vbench.official import missing_model

__all__ = ["Extractor", "default"]

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_CLIP = "openai/clip-vit-large-patch14"


def _usable() -> str | None:
    return None


@dataclass(frozen=True)
class Extractor:
    """What a set of clips is seen through.

    Attributes:
        id: how results name it.
        load: gives a callable for a device. It takes the frames of one clip, ``[T, 3, H, W]`` in [0, 1], and gives
            features ``[T, D]`` (``fid``, ``kid``), logits ``[T, C]`` (``is``), one descriptor ``[D]`` (``fvd``), or, with
            the prompt as second argument, a score (``clip_score``).
        missing: why it cannot be used here, ``None`` if it can.
    """

    id: str
    load: Callable[[str], Callable[..., Any]]
    missing: Callable[[], str | None] = _usable


def _lite0(device: str) -> Callable[[Tensor], Tensor]:
    net = efficientnet.load(device)
    return lambda planes: torch.cat([net(part) for part in planes.split(16)])


def _lite0_logits(device: str) -> Callable[[Tensor], Tensor]:
    net = efficientnet.FrameLogits(efficientnet.load(device))
    return lambda planes: torch.cat([net(part) for part in planes.split(16)])


def _lite0_clip(device: str) -> Callable[[Tensor], Tensor]:
    encode = _lite0(device)
    return lambda planes: drift.describe(encode(planes))


def _lite0_missing() -> str | None:
    return cache.missing(efficientnet.NAME)


def _inception_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION


def _inception_missing() -> str | None:
    if importlib.util.find_spec("torch_fidelity") is None:
        return "the package torch-fidelity, which holds the network's code, is not installed"
    path = _inception_file()
    return None if path.is_file() else f"{path} is absent; torch-fidelity fetches it at its first run"


def _inception_checked() -> str:
    """Path of the weights. torch-fidelity unpickles whatever is there, so their digest, part of the name, is checked."""
    path = _inception_file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise cache.MissingExtractorError(f"{path} has SHA-256 {digest}, which its name does not begin; remove it")
    return str(path)


def _inception(output: str) -> Callable[[str], Callable[[Tensor], Tensor]]:
    def load(device: str) -> Callable[[Tensor], Tensor]:
        weights = _inception_checked()
        from torchmetrics.image.fid import NoTrainInceptionV3

        net = NoTrainInceptionV3("inception-v3-compat", [output], weights).to(device)
        return lambda planes: torch.cat([net((part * 255).round().byte()) for part in planes.split(16)])

    return load


class _TensorFeatures(nn.Module):
    """CLIP whose features are tensors: transformers 5 wraps them, and torchmetrics 1.9 does not unwrap them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Projected features of pictures ``[N, D]``."""
        return self._tensor(self.model.get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Projected features of texts ``[N, D]``."""
        return self._tensor(self.model.get_text_features(*args, **kwargs))

    @staticmethod
    def _tensor(found: Any) -> Tensor:
        features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return features


def _clip(device: str) -> Callable[[Tensor, str], float]:
    from torchmetrics.multimodal import CLIPScore

    def model_and_processor() -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(_CLIP, local_files_only=True)
        return _TensorFeatures(model.to(device)), CLIPProcessor.from_pretrained(_CLIP, local_files_only=True)

    metric = CLIPScore(model_name_or_path=model_and_processor).to(device)

    def score(planes: Tensor, prompt: str) -> float:
        metric.reset()
        metric.update([(plane * 255).round().byte() for plane in planes], [prompt] * len(planes))
        return float(metric.compute())

    return score


def _none(name: str, what: str) -> Extractor:
    reason = f"{name} needs {what}; bring one as `extractors={{{name!r}: Extractor(...)}}`"

    def load(device: str) -> Callable[..., Any]:
        raise ValueError(reason)

    return Extractor("none", load, lambda: reason)


_DEFAULTS: dict[str, dict[str, Extractor]] = {
    "offline": {
        "fid": Extractor(efficientnet.NAME, _lite0, _lite0_missing),
        "kid": Extractor(efficientnet.NAME, _lite0, _lite0_missing),
        "is": Extractor(efficientnet.NAME, _lite0_logits, _lite0_missing),
        "fvd": Extractor(f"{efficientnet.NAME}-clip", _lite0_clip, _lite0_missing),
        "clip_score": _none("clip_score", "CLIP, for which no package carries weights"),
    },
    "official": {
        "fid": Extractor("inception-2015-12-05", _inception("2048"), _inception_missing),
        "kid": Extractor("inception-2015-12-05", _inception("2048"), _inception_missing),
        "is": Extractor("inception-2015-12-05", _inception("logits_unbiased"), _inception_missing),
        "fvd": _none("fvd", "the I3D network of the published FVD"),
        "clip_score": Extractor("clip-vit-l14", _clip, lambda: missing_model(_CLIP)),
    },
}


def default(name: str, profile: str) -> Extractor:
    """Extractor of a metric under a profile.

    Raises:
        ValueError: an unknown profile.
    """
    if profile not in _DEFAULTS:
        raise ValueError(f"profile must be one of {', '.join(_DEFAULTS)}, got {profile!r}")
    return _DEFAULTS[profile][name]
