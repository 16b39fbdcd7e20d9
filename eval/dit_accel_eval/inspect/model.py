"""What a capture holds, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel_eval.files import replacing, write_json
from dit_accel_eval.maps import HeadMaps

__all__ = ["VERSION", "Capture", "Look", "look_bytes"]

VERSION = 1
_JSON, _TENSORS = "capture.json", "capture.safetensors"
_MAPS = ("raster", "ordered", "kept", "attention", "visible")


@dataclass(frozen=True, eq=False)
class Look:
    """One layer at one step of one method.

    Attributes:
        method: name of the method.
        component: name of the transformer in the pipeline.
        layer: index of the layer.
        name: its module path.
        step: denoising step.
        timestep: as the model gets it, or ``None``.
        heads: indices of the heads.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        orders: name of the token order of each head.
        dense: why dense attention was computed, ``None`` on a sparse call.
        notes: what the maps do not show.
        rows: int32 ``[R]``, the query blocks in the maps.
        raster: float16 ``[heads, R, Kb]``, softmax mass of each block in the model's order.
        ordered: like ``raster``, in the order of the plan; ``None`` without a plan that moves tokens.
        kept: uint8 like ``raster``, levels of the plan's blocks: 0 skipped, 1 exact, 255 windows; ``None`` without plan.
        place: int32 ``[heads, n]``, position of each sampled token in the plan's order; ``None`` like ``ordered``.
        attention: float16 ``[heads, n, S]``, attention of each sampled token to every token, natural order.
        visible: uint8 ``[heads, n, ceil(S / 8)]``, one bit for each token that is computed for the sampled one, the lowest
            bit first; ``None`` without a plan.
    """

    method: str
    component: str
    layer: int
    name: str
    step: int
    timestep: float | None
    heads: tuple[int, ...]
    block_q: int
    block_k: int
    orders: tuple[str, ...]
    dense: str | None
    notes: tuple[str, ...]
    rows: Tensor
    raster: Tensor
    ordered: Tensor | None
    kept: Tensor | None
    place: Tensor | None
    attention: Tensor
    visible: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by field name, those that exist."""
        found = {name: getattr(self, name) for name in ("rows", "place", *_MAPS)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def seen(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens are computed for each sampled one, bool ``[heads, n, S]``; ``None`` without a plan."""
        if self.visible is None:
            return None
        bits = np.unpackbits(self.visible.numpy(), axis=-1, bitorder="little")
        return bits[..., : self.attention.shape[-1]].astype(bool)

    def head_maps(self) -> list[HeadMaps] | None:
        """Maps of each head with their numbers, ``None`` without a plan."""
        if self.kept is None:
            return None
        ordered = self.raster if self.ordered is None else self.ordered
        computed = self.kept != 0  # levels: a block that windows cut is 255
        parts = zip(self.heads, self.orders, self.raster, ordered, computed, strict=True)
        return [HeadMaps(self.layer, head, *rest) for head, *rest in parts]

    def recall(self) -> list[float] | None:
        """Softmax mass that the plan computes, by head; ``None`` without a plan.

        Of the rows of the maps; where windows cut into blocks, of the sampled tokens.
        """
        maps, seen = self.head_maps(), self.seen()
        if maps is None or seen is None:
            return None
        if self.kept is None or not bool((self.kept > 1).any()):
            return [one.recall for one in maps]
        mass = self.attention.float().numpy()
        return [float(v) for v in (mass * seen).sum(-1).mean(-1) / np.maximum(mass.sum(-1).mean(-1), 1e-12)]

    def density(self) -> list[float] | None:
        """Share of blocks that the plan computes in the rows of the maps, by head; ``None`` without a plan."""
        return None if self.kept is None else [float(v) for v in (self.kept != 0).float().mean((1, 2))]

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as plain JSON types."""
        return {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("rows", "place", *_MAPS)
        }


def look_bytes(heads: int, rows: int, key_blocks: int, sampled: int, tokens: int) -> int:
    """Most bytes that a :class:`Look` holds: two maps in float16, the levels, attention in float16, visibility in bits."""
    maps = rows * key_blocks * (2 + 2 + 1)
    return heads * (maps + sampled * (2 * tokens + -(-tokens // 8) + 4)) + 4 * rows


@dataclass(frozen=True, eq=False)
class Capture:
    """Attention of some calls of a pipeline.

    Attributes:
        prompt: what was generated.
        seed: of the noise.
        geometry: where the tokens sit.
        tokens: sampled query tokens, in natural order.
        looks: what was captured.
        frames: uint8 ``[F, h, w, 3]`` by method, one picture for each frame of tokens; empty where nothing was decoded.
        missing: what was asked for and never happened, with the reason.
        settings: arguments of the pipeline call that are plain.
    """

    prompt: str
    seed: int
    geometry: TokenGeometry
    tokens: tuple[int, ...]
    looks: tuple[Look, ...]
    frames: Mapping[str, npt.NDArray[np.uint8]]
    missing: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(look.nbytes for look in self.looks) + sum(clip.nbytes for clip in self.frames.values())

    def save(self, folder: str | Path) -> Path:
        """Write ``capture.json`` and ``capture.safetensors`` to a folder, which is made if need be; the folder.

        Raises:
            OSError: the folder cannot be written to.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"looks.{i}.{k}": t.contiguous() for i, look in enumerate(self.looks) for k, t in look.tensors().items()
        }
        methods = list(self.frames)
        tensors |= {f"frames.{i}": torch.from_numpy(self.frames[name].copy()) for i, name in enumerate(methods)}
        with replacing(folder / _TENSORS) as temporary:
            save_file(tensors, temporary)
        data = {
            "version": VERSION,
            "prompt": self.prompt,
            "seed": self.seed,
            "geometry": asdict(self.geometry),
            "tokens": list(self.tokens),
            "looks": [look.to_dict() for look in self.looks],
            "frames": methods,
            "missing": list(self.missing),
            "settings": dict(self.settings),
        }
        write_json(folder / _JSON, data)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Capture:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no capture there.
            ValueError: its version is not known, or the two files do not belong together.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (_JSON, _TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a capture: it has no {name}")
        data = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise ValueError(f"{folder}/{_JSON} must be of version {VERSION}, got {data.get('version')!r}")
        tensors = load_file(folder / _TENSORS)
        try:
            looks = tuple(_look(entry, tensors, f"looks.{i}.") for i, entry in enumerate(data["looks"]))
            frames = {name: tensors[f"frames.{i}"].numpy() for i, name in enumerate(data["frames"])}
        except KeyError as error:
            raise ValueError(f"{folder}: {_JSON} and {_TENSORS} do not belong together, {error} is missing") from None
        grid = data["geometry"]["grid"]
        geometry = TokenGeometry(**{**data["geometry"], "grid": None if grid is None else tuple(grid)})
        return cls(
            prompt=data["prompt"],
            seed=data["seed"],
            geometry=geometry,
            tokens=tuple(data["tokens"]),
            looks=looks,
            frames=frames,
            missing=tuple(data["missing"]),
            settings=data["settings"],
        )


def _look(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Look:
    known = {name: tensors.get(prefix + name) for name in ("ordered", "kept", "place", "visible")}
    needed = {name: tensors[prefix + name] for name in ("rows", "raster", "attention")}
    lists = {name: tuple(entry[name]) for name in ("heads", "orders", "notes")}
    return Look(**{**entry, **lists, **known, **needed})
