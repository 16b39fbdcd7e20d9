"""A small trained gate over pooled queries and keys, after SeerAttention (arXiv 2410.13276), and its file.

For each layer and head, with pooled features ``x_i`` of query block ``i`` and ``y_j`` of key block ``j``::

    logits[i, j] = (x_i Wq) . (y_j Wk) + log(count_j)  [+ scale * mean(q)_i . mean(k)_j]

The term in brackets, base ``"mean_pool"``, lets a gate begin where mean pooling stands. SeerAttention pools before RoPE and
rotates what the gate makes of it; here queries and keys are seen after RoPE, so its checkpoints do not fit.

The file is safetensors: ``query`` ``[L, H, Fq * D, W]`` and ``key`` ``[L, H, Fk * D, W]``, float16 or float32, and JSON
metadata under the key ``gate``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_accel._files import write_whole
from dit_accel.learned import POOLS, BlockFeatures

if TYPE_CHECKING:
    from dit_accel.method import Method

__all__ = ["Gate", "GateInfo"]

_FORMAT = "dit_accel.gate"
_VERSION = 1
_BASES = ("none", "mean_pool")


@dataclass(frozen=True)
class GateInfo:
    """What a gate was trained for.

    Attributes:
        model: transformer class name.
        layers: module paths of the self-attention layers, in order.
        heads: attention heads.
        head_dim: size of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        order: candidate token orders of the method.
        query_pools: how query blocks are pooled, of :data:`dit_accel.learned.POOLS`.
        key_pools: how key blocks are pooled.
        base: ``"mean_pool"`` if the gate adds to the scores of mean pooling, or ``"none"``.
        note: what it was trained on.
    """

    model: str
    layers: tuple[str, ...]
    heads: int
    head_dim: int
    block_q: int = 64
    block_k: int = 64
    order: tuple[str, ...] = ("raster",)
    query_pools: tuple[str, ...] = ("mean",)
    key_pools: tuple[str, ...] = ("mean", "max", "min")
    base: str = "mean_pool"
    note: str = ""

    def __post_init__(self) -> None:
        """Check types, pools and base."""
        for name in ("layers", "order", "query_pools", "key_pools"):
            value = getattr(self, name)
            ok = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(v, str) for v in value)
            if not ok:
                raise ValueError(f"{name} of a gate must be a list of names, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("heads", "head_dim", "block_q", "block_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a gate must be a number of at least 1, got {value!r}")
        unknown = [kind for kind in (*self.query_pools, *self.key_pools) if kind not in POOLS]
        if unknown:
            raise ValueError(f"pools of a gate must be among {', '.join(POOLS)}, got {unknown}")
        if self.base not in _BASES:
            raise ValueError(f"base of a gate must be one of {', '.join(_BASES)}, got {self.base!r}")


class Gate:
    """A trained gate; a scorer for :func:`dit_accel.register_scorer`.

    Args:
        info: what it was trained for.
        query: ``[L, H, Fq * D, W]`` with ``Fq`` query pools.
        key: ``[L, H, Fk * D, W]`` with ``Fk`` key pools.

    Raises:
        ValueError: shapes that do not fit ``info``, or weights that are not finite.
    """

    def __init__(self, info: GateInfo, query: Tensor, key: Tensor) -> None:
        for name, weight, pools in (("query", query, info.query_pools), ("key", key, info.key_pools)):
            expected = (len(info.layers), info.heads, len(pools) * info.head_dim)
            if weight.ndim != 4 or tuple(weight.shape[:3]) != expected or weight.shape[3] != query.shape[3]:
                raise ValueError(
                    f"{name} weights of a gate must be [{', '.join(map(str, expected))}, W], got {list(weight.shape)}"
                )
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{name} weights of the gate are not finite")
        self.info = info
        self.query, self.key = query, key
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, features: BlockFeatures) -> Tensor:
        """Logits of one layer, float32 ``[B, H, Qb, Kb]``."""
        query, key = self._weights(features.count.device)
        x = features.query(self.info.query_pools)
        y = features.key(self.info.key_pools)
        logits = (x @ query[features.layer]) @ (y @ key[features.layer]).mT
        if self.info.base == "mean_pool":
            logits = logits + features.query() * features.scale @ features.key().mT
        return logits + features.count.clamp(min=1).float().log()[:, None, None]

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._moved:
            self._moved[device] = self.query.to(device, torch.float32), self.key.to(device, torch.float32)
        return self._moved[device]

    def check(self, method: Method, model: str, layers: tuple[str, ...]) -> None:
        """Check that the gate was trained for this method and transformer.

        Raises:
            ValueError: saying what differs.
        """
        info = self.info
        for what, trained, now in (
            ("the transformer", info.model, model),
            ("blocks", (info.block_q, info.block_k), (method.block_q, method.block_k)),
            ("the order", info.order, method.order),
            ("the layers", info.layers, layers),
        ):
            if trained != now:
                raise ValueError(f"the gate was trained for another setting: {what} {trained}, now {now}")

    def save(self, path: str | Path) -> None:
        """Write the file, atomically."""
        meta = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self.info)})
        data = save({"query": self.query.contiguous().cpu(), "key": self.key.contiguous().cpu()}, {"gate": meta})
        write_whole(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no gate, of a newer version, or incomplete.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no gate at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("gate", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a readable gate: {error}") from None
        try:
            return cls(_info(meta), tensors["query"], tensors["key"])
        except KeyError as error:
            raise ValueError(f"{path}: the gate has no tensor {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _info(meta: Any) -> GateInfo:
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise ValueError("this is not a gate of dit_accel")
    version = meta.get("version")
    if not isinstance(version, int) or version > _VERSION:
        raise ValueError(f"the gate has version {version!r}, this dit_accel reads up to {_VERSION}")
    known = {field.name for field in fields(GateInfo)}
    given = {key: value for key, value in meta.items() if key not in ("format", "version")}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"the gate has unknown metadata {unknown}; known are {sorted(known)}")
    return GateInfo(**given)
