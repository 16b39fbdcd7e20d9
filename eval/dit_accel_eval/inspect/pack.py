"""Making a capture small enough for a page: 64 shades on a square-root scale, fewer columns, deflate."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_accel_eval.inspect.model import Capture, Look

__all__ = ["Packed", "pack"]

Bytes = npt.NDArray[np.uint8]
_MOST_COLUMNS = 256


@dataclass
class Packed:
    """A capture for the page.

    Attributes:
        data: plain JSON types; blobs are named by their index.
        blobs: base64 of zlib streams.
        tokens: how many of the sampled tokens are in it.
    """

    data: dict[str, Any] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def size(self) -> int:
        """Bytes of the blobs."""
        return sum(map(len, self.blobs))

    def add(self, values: Bytes) -> int:
        """Keep bytes; the index of their blob."""
        stream = zlib.compress(np.ascontiguousarray(values).tobytes(), 9)
        self.blobs.append(base64.b64encode(stream).decode())
        return len(self.blobs) - 1


def _squeeze(values: npt.NDArray[Any]) -> tuple[Bytes, list[float]]:
    """64 shades from 0 to 255 on a square-root scale below the largest value of each leading index, and that value."""
    flat = values.astype(np.float32).reshape(len(values), -1)
    peak = flat.max(1)
    share = np.sqrt(flat / np.maximum(peak, 1e-12)[:, None])
    # 64 shades: no eye sees more, and what lies between them would be most of the file.
    shades = np.rint(np.rint(share * 63) * (255 / 63)).astype(np.uint8)
    return shades.reshape(values.shape), [float(p) for p in peak]


def _columns(values: npt.NDArray[Any], group: int, mean: bool) -> npt.NDArray[np.float32]:
    """Sum or mean over groups of neighbouring key blocks."""
    starts = np.arange(0, values.shape[-1], group)
    summed: npt.NDArray[np.float32] = np.add.reduceat(values.astype(np.float32), starts, axis=-1)
    if mean:
        summed /= np.diff([*starts, values.shape[-1]]).astype(np.float32)
    return summed


def _map(packed: Packed, values: npt.NDArray[Any] | None, group: int) -> dict[str, Any] | None:
    if values is None:
        return None
    levels, peak = _squeeze(_columns(values, group, mean=False))
    return {"blob": packed.add(levels), "peak": peak}


def _own_frame(capture: Capture, look: Look, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """Share of each token's attention that lies in its own frame, ``[heads, n]``."""
    geometry = capture.geometry
    frames, height, width = geometry.axes
    visual = look.attention[:, chosen, geometry.visual_slice].float().numpy()
    by_frame = visual.reshape(*visual.shape[:2], frames, height * width).sum(-1)
    at = (np.asarray(capture.tokens)[chosen] - geometry.prefix) // (height * width)
    own: npt.NDArray[np.float32] = np.take_along_axis(by_frame, at.clip(0, frames - 1)[None, :, None], 2)[..., 0]
    return own


def _rounded(values: npt.NDArray[Any]) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()


def _look(packed: Packed, capture: Capture, look: Look, chosen: npt.NDArray[np.intp]) -> dict[str, Any]:
    group = -(-look.raster.shape[-1] // _MOST_COLUMNS)
    attention = look.attention[:, chosen].float().numpy()
    seen, recall, maps = look.seen(), look.recall(), look.head_maps()
    flat = attention.reshape(-1, attention.shape[-1])
    levels, peak = _squeeze(flat[:, capture.geometry.visual_slice])
    kept = None
    if look.kept is not None:
        share = _columns((look.kept != 0).numpy(), group, mean=True)
        kept = packed.add(np.rint(share * 255).astype(np.uint8))
    found: dict[str, Any] = {
        **{k: v for k, v in look.to_dict().items() if k not in ("heads", "orders", "notes")},
        "heads": list(look.heads),
        "orders": list(look.orders),
        "notes": list(look.notes),
        "rows": look.rows.tolist(),
        "columns": -(-look.raster.shape[-1] // group),
        "group": group,
        "raster": _map(packed, look.raster.numpy(), group),
        "ordered": _map(packed, None if look.ordered is None else look.ordered.numpy(), group),
        "kept": kept,
        "place": None if look.place is None else look.place[:, chosen].tolist(),
        "attention": {"blob": packed.add(levels), "peak": peak},
        "visible": None,
        "own": _rounded(_own_frame(capture, look, chosen)),
        "recall": None if recall is None else _rounded(np.asarray(recall)),
        "raster_recall": None if maps is None else _rounded(np.asarray([one.raster_recall for one in maps])),
        "density": None if look.kept is None else _rounded(np.asarray(look.density())),
    }
    visual = attention[..., capture.geometry.visual_slice]
    found["extra"] = _rounded(attention.sum(-1) - visual.sum(-1))
    if seen is not None:
        seen = seen[:, chosen]
        bits = seen.reshape(-1, seen.shape[-1])[:, capture.geometry.visual_slice]
        found["visible"] = packed.add(np.packbits(bits, axis=-1, bitorder="little"))
        found["mass"] = _rounded((attention * seen).sum(-1) / np.maximum(attention.sum(-1), 1e-12))
    return found


def _frames(frames: Bytes) -> dict[str, Any]:
    """One sheet of pictures as WebP."""
    from dit_accel_eval.report.sprites import Tier, encode

    sheet = encode(frames, Tier(quality=80, side=256))
    return {"picture": sheet.data, **sheet.to_dict()}


def pack(capture: Capture, every: int = 1) -> Packed:
    """Make a capture ready for the page.

    Args:
        capture: the capture.
        every: keep each so-many-th sampled token.

    Raises:
        ValueError: there is nothing in the capture.
    """
    if not capture.looks:
        raise ValueError("the capture holds no attention, so there is nothing to show")
    chosen = np.arange(0, len(capture.tokens), every)
    packed = Packed(tokens=len(chosen))
    geometry = capture.geometry
    packed.data = {
        "prompt": capture.prompt,
        "seed": capture.seed,
        "grid": list(geometry.axes),
        "prefix": geometry.prefix,
        "suffix": geometry.suffix,
        "count": geometry.tokens,
        "tokens": [capture.tokens[i] for i in chosen],
        "frames": {name: _frames(clip) for name, clip in capture.frames.items()},
        "looks": [_look(packed, capture, look, chosen) for look in capture.looks],
    }
    return packed
