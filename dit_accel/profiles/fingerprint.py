"""Which model a profile was made for: its class, its configuration and the shapes of its weights, not their values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

__all__ = ["Fingerprint", "fingerprint"]

_HEX = 16


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a transformer, 16 hexadecimal digits each.

    Attributes:
        config: of its configuration, less what names files and versions (keys that begin with an underscore).
        shapes: of the names and shapes of its parameters.
    """

    config: str
    shapes: str

    def differs(self, other: Fingerprint) -> str | None:
        """What differs from ``other``, in words, or ``None``."""
        found = [name for name in ("config", "shapes") if getattr(self, name) != getattr(other, name)]
        return {0: None, 1: f"its {found[0] if found else ''} differ", 2: "its config and shapes differ"}[len(found)]

    def to_dict(self) -> dict[str, str]:
        """Plain JSON types."""
        return asdict(self)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Fingerprint of a transformer. Adapters such as LoRA add parameters under names of their own, which do not count."""
    config = getattr(module, "config", None)
    plain = _plain(dict(config)) if isinstance(config, Mapping) else {}
    kept = {key: value for key, value in plain.items() if not key.startswith("_")}
    shapes = sorted((name.replace(".base_layer.", "."), list(p.shape)) for name, p in module.named_parameters())
    shapes = [(name, shape) for name, shape in shapes if ".lora_" not in name]
    return Fingerprint(_digest(kept), _digest(shapes))


def _plain(value: Any) -> Any:
    """JSON types of a configuration; whatever else it holds counts by its class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HEX]
