"""Sets of clips against sets of references: FID, KID, Inception Score, CLIPScore and a Fréchet distance of clips.

Every frame counts as a picture. The formulas are torchmetrics'; the pictures are seen through the extractor named in
each result. With about a hundred clips FID is mostly bias: read KID, its error bar and the floor, the same number for
one half of the references against the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel_eval.metrics.feature_nets import Extractor, default
from dit_accel_eval.metrics.frames import as_frames

__all__ = ["NAMES", "available", "evaluate", "fid", "frechet_distance", "inception_score", "kid"]

#: What :func:`evaluate` knows, with its meaning.
NAMES = {
    "fid": "Fréchet distance of frame features, lower is better",
    "kid": "kernel distance of frame features, lower is better, unbiased in the number of frames",
    "is": "Inception Score, higher is better, needs no references",
    "clip_score": "likeness of frames and prompts, higher is better",
    "fvd": "Fréchet distance of clip descriptors, lower is better",
}
_SUBSETS = 100


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """The caller's random state is left alone, and torchmetrics' remark that it keeps the features is not passed on."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        torch.manual_seed(seed)
        yield


def fid(features: Tensor, references: Tensor) -> float:
    """Fréchet Inception Distance (arXiv 1706.08500) of features ``[N, D]`` and ``[M, D]``."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(features.shape[1])).set_dtype(torch.float64)
    metric.update(references.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """The same distance where there are fewer samples than features, without the root of a large matrix.

    The trace of the root of the product of both covariances is the sum of the singular values of the product of both
    centred sample matrices.

    Args:
        features: ``[N, D]``, N at least 2.
        references: ``[M, D]``, M at least 2.
    """
    x, y = features.double(), references.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = float(torch.linalg.svdvals(a @ b.T).sum())
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()) - 2 * cross


def kid(features: Tensor, references: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Kernel Inception Distance (arXiv 1801.01401): mean and standard deviation over 100 random subsets.

    A subset holds half the smaller set, 1000 at most, so that subsets differ.

    Args:
        features: ``[N, D]``, N at least 4.
        references: ``[M, D]``, M at least 4.
        seed: of the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, min(len(features), len(references)) // 2)
    with _reproducible(seed):
        metric = KernelInceptionDistance(feature=_Given(features.shape[1]), subsets=_SUBSETS, subset_size=size)
        metric.update(references.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Inception Score (arXiv 1606.03498): mean and standard deviation over up to ten splits of logits ``[N, C]``."""
    from torchmetrics.image.inception import InceptionScore

    with _reproducible(seed):
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=min(10, len(logits)))
        metric.update(logits.double())
        mean, deviation = metric.compute()
    deviation = float(deviation)
    return float(mean), deviation if deviation == deviation else 0.0


@dataclass(frozen=True)
class _Seen:
    """What was kept of a set of clips: one row for each frame or clip."""

    frames: Tensor
    logits: Tensor
    clips: Tensor
    clip_of_frame: Tensor
    likeness: Tensor


def available(name: str, profile: str = "offline") -> str | None:
    """Why a distribution metric cannot be used here under a profile, ``None`` if it can.

    Raises:
        ValueError: an unknown name or profile.
    """
    _known([name])
    return default(name, profile).missing()


def _known(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"distribution metric must be one of {', '.join(NAMES)}, got {name!r}")


def _tools(
    names: Sequence[str], profile: str, own: Mapping[str, Extractor], device: str
) -> dict[str, Callable[..., Any]]:
    tools = {}
    for name in names:
        extractor = own.get(name) or default(name, profile)
        reason = extractor.missing()
        if reason is not None:
            raise ValueError(f"metric {name!r} cannot be used under profile {profile!r}: {reason}")
        tools[name] = extractor.load(device)
    return tools


def _see(
    clips: Iterable[Any], tools: Mapping[str, Callable[..., Any]], what: str, device: str, prompts: Sequence[str] | None
) -> _Seen:
    """Pass every clip once through every network."""
    rows: dict[str, list[Tensor]] = {"frames": [], "logits": [], "clips": [], "clip_of_frame": [], "likeness": []}
    for index, clip in enumerate(clips):
        planes = as_frames(clip, f"{what} {index}").to(device).permute(0, 3, 1, 2)
        rows["clip_of_frame"].append(torch.full((len(planes),), index))
        with torch.inference_mode():
            for name, key in (("fid", "frames"), ("is", "logits"), ("fvd", "clips")):
                tool = tools.get(name) or (tools.get("kid") if name == "fid" else None)
                if tool is not None:
                    found = tool(planes).double().cpu()
                    rows[key].append(found[None] if name == "fvd" else found)
            if prompts is not None and "clip_score" in tools:
                if index >= len(prompts):
                    raise ValueError(f"there are more {what}s than prompts ({len(prompts)})")
                rows["likeness"].append(torch.tensor([float(tools["clip_score"](planes, prompts[index]))]))
    count = len(rows["clip_of_frame"])
    if not count:
        raise ValueError(f"there must be at least one {what}, got none")
    if rows["likeness"] and prompts is not None and len(prompts) != count:
        raise ValueError(f"there must be one prompt for each {what}, got {len(prompts)} for {count}")
    return _Seen(**{key: torch.cat(found) if found else torch.empty(0) for key, found in rows.items()})


def evaluate(
    clips: Iterable[Any],
    references: Iterable[Any],
    names: Sequence[str] = ("fid", "kid"),
    *,
    prompts: Sequence[str] | None = None,
    profile: str = "offline",
    extractors: Mapping[str, Extractor] | None = None,
    floor: bool = True,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Compare two sets of clips.

    Args:
        clips: frames ``[T, H, W, 3]`` each, uint8, or floating point in [0, 1]; read once, one at a time.
        references: like ``clips``; real clips, or dense ones.
        names: keys of :data:`NAMES`.
        prompts: one for each clip, for ``clip_score``.
        profile: ``offline`` or ``official``, which decides the extractors.
        extractors: extractors to use in place of the profile's, by metric. ``fid`` and ``kid`` share one.
        floor: also compare one half of the references with the other, clips kept whole.
        device: where networks run.

    Returns:
        For each name ``value``, ``std`` or ``None``, ``floor`` or ``None``, ``extractor``, ``clips``, ``frames`` and
        ``reference_frames``.

    Raises:
        ValueError: an unknown name, a missing extractor, too few clips or frames, a clip that is none, or prompts that
            do not fit.
    """
    _known(names)
    own = dict(extractors or {})
    if own.get("fid", own.get("kid")) is not own.get("kid", own.get("fid")):
        raise ValueError("fid and kid see frames through one extractor, got two")
    if "fid" in own or "kid" in own:
        own["fid"] = own["kid"] = own.get("fid") or own["kid"]
    tools = _tools(names, profile, own, device)
    if "clip_score" in names and prompts is None:
        raise ValueError("clip_score compares with prompts, and none were given")
    seen = _see(clips, tools, "clip", device, prompts)
    need = [name for name in names if name in ("fid", "kid", "fvd")]
    base = _see(references, {name: tools[name] for name in need}, "reference", device, None) if need else None
    ids = {name: (own.get(name) or default(name, profile)).id for name in names}
    return {name: _record(name, ids[name], seen, base if name in need else None, floor) for name in names}


def _record(name: str, extractor: str, seen: _Seen, base: _Seen | None, floor: bool) -> dict[str, Any]:
    value, deviation = _measure(name, seen, base)
    return {
        "value": value,
        "std": deviation,
        "floor": _floor(name, base) if floor and base is not None else None,
        "extractor": extractor,
        "clips": int(seen.clip_of_frame[-1]) + 1,
        "frames": len(seen.clip_of_frame),
        "reference_frames": len(base.clip_of_frame) if base is not None else 0,
    }


def _enough(name: str, x: Tensor, y: Tensor, least: int, unit: str) -> None:
    if min(len(x), len(y)) < least:
        raise ValueError(f"{name} needs at least {least} {unit} on each side, got {len(x)} and {len(y)}")


def _measure(name: str, seen: _Seen, base: _Seen | None) -> tuple[float, float | None]:
    if name == "is":
        return inception_score(seen.logits)
    if name == "clip_score":
        values = seen.likeness.double()
        return float(values.mean()), float(values.std()) if len(values) > 1 else None
    assert base is not None
    return _distance(name, seen, base)


def _distance(name: str, seen: _Seen, base: _Seen) -> tuple[float, float | None]:
    if name == "kid":
        _enough("kid", seen.frames, base.frames, 4, "frames")
        return kid(seen.frames, base.frames)
    if name == "fid":
        _enough("fid", seen.frames, base.frames, 2, "frames")
        return fid(seen.frames, base.frames), None
    _enough("fvd", seen.clips, base.clips, 2, "clips")
    return frechet_distance(seen.clips, base.clips), None


def _floor(name: str, base: _Seen) -> float | None:
    """Every second reference against the others; ``None`` if a half would be too small."""
    halves = []
    for odd in (False, True):
        of_clip = torch.arange(int(base.clip_of_frame[-1]) + 1) % 2 == int(odd)
        of_frame = of_clip[base.clip_of_frame]
        halves.append(
            _Seen(
                base.frames[of_frame] if len(base.frames) else base.frames,
                base.logits,
                base.clips[of_clip] if len(base.clips) else base.clips,
                base.clip_of_frame[of_frame],
                base.likeness,
            )
        )
    try:
        return _distance(name, halves[0], halves[1])[0]
    except ValueError:
        return None
