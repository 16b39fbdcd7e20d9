"""A slot for trained block scorers: what they see, and how they are made known.

A scorer is any callable ``(BlockFeatures) -> logits``, float32 ``[B, H, Qb, Kb]``; the engine takes the softmax over the
key blocks and selects as for any other score. It is used as ``score="learned:NAME"`` after
``dit_accel.register_scorer(NAME, ...)``, given as a callable or as a file of :class:`dit_accel.gate.Gate`.

A scorer may have a method ``check(method, model, layers)`` that raises ``ValueError`` if it was not made for this model; it
is called when a transformer is accelerated.

What is not offered: the selection of SLA (arXiv 2509.24006) and VSA (arXiv 2505.13389) has no trained part, it is the top-k
of block means (``score="mean_pool"``). What their checkpoints have learned is SLA's projection of a linear-attention branch
and VSA's gate of the coarse output, which reads the hidden states before attention; neither is a block score, and their
weights are not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel._specs import parse_spec

if TYPE_CHECKING:
    from dit_accel.context import PlanContext
    from dit_accel.method import Method

__all__ = ["POOLS", "BlockFeatures", "Scorer", "find_scorer", "missing_scorer", "pool", "register_scorer"]

#: How the tokens of a block become one vector.
POOLS = ("mean", "max", "min")


def pool(x: Tensor, block: int, kinds: Sequence[str], valid: Tensor | None = None) -> Tensor:
    """Pooled features of each block, one kind after the other.

    Args:
        x: ``[B, H, S, D]`` in block order.
        block: tokens in a block; the last one may be ragged.
        kinds: of :data:`POOLS`.
        valid: bool ``[B, S]``, false for tokens that do not count.

    Returns:
        float32 ``[B, H, ceil(S / block), len(kinds) * D]``; 0 for blocks without a valid token.

    Raises:
        ValueError: for an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in POOLS]
    if unknown:
        raise ValueError(f"pools must be among {', '.join(POOLS)}, got {unknown}")
    pad = -x.shape[2] % block
    seen = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid
    seen = F.pad(seen, (0, pad)).unflatten(1, (-1, block))[:, None, :, :, None]
    tokens = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, block))
    count = seen.sum(3)
    parts = []
    for kind in kinds:
        if kind == "mean":
            part = tokens.where(seen, 0).sum(3, dtype=torch.float32) / count.clamp(min=1)
        elif kind == "max":
            part = tokens.where(seen, -torch.inf).amax(3).float()
        else:
            part = tokens.where(seen, torch.inf).amin(3).float()
        parts.append(part.where(count > 0, 0))
    return torch.cat(parts, -1)


@dataclass(frozen=True, eq=False)
class BlockFeatures:
    """What a scorer sees of one attention layer: queries and keys after RoPE, in block order, a block at a time.

    Attributes:
        layer: number of the layer.
        count: valid tokens in each key block, ``[B|1, Kb]``.
        scale: factor of the logits.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
    """

    layer: int
    count: Tensor
    scale: float
    block_q: int
    block_k: int
    _query: Tensor
    _key: Tensor
    _valid: Tensor | None = None

    @classmethod
    def of(cls, ctx: PlanContext) -> BlockFeatures:
        """Features of a planning context."""
        return cls(
            ctx.layer, ctx.key_stats.count, ctx.scale, ctx.block_q, ctx.block_k, ctx.queries, ctx.keys, ctx.valid
        )

    def query(self, kinds: Sequence[str] = ("mean",)) -> Tensor:
        """Pooled queries, float32 ``[B, H, Qb, len(kinds) * D]``; see :func:`pool`."""
        return pool(self._query, self.block_q, kinds)

    def key(self, kinds: Sequence[str] = ("mean",)) -> Tensor:
        """Pooled keys, float32 ``[B, H, Kb, len(kinds) * D]``; see :func:`pool`."""
        return pool(self._key, self.block_k, kinds, self._valid)


#: ``(features) -> logits``, float32 ``[B, H, Qb, Kb]``.
Scorer = Callable[[BlockFeatures], Tensor]

_scorers: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer | str | Path, *, replace: bool = False) -> Scorer:
    """Make a trained scorer known, for ``score="learned:NAME"``.

    Args:
        name: letters, digits, ``_`` and ``-``.
        scorer: a callable ``(BlockFeatures) -> logits`` float32 ``[B, H, Qb, Kb]``, or a file that
            :class:`~dit_accel.gate.Gate` reads.
        replace: whether the name may be taken already.

    Returns:
        The scorer.

    Raises:
        ValueError: a bad or taken name, or a file that is no gate.
        FileNotFoundError: no such file.
        TypeError: neither a callable nor a path.
    """
    if not isinstance(name, str) or parse_spec(name).name != name:
        raise ValueError(f"name of a scorer must be letters, digits, '_' or '-', got {name!r}")
    if name in _scorers and not replace and _scorers[name] is not scorer:
        raise ValueError(f"scorer {name!r} is registered already; pass replace=True to exchange it")
    if isinstance(scorer, str | Path):
        from dit_accel.gate import Gate

        scorer = Gate.load(scorer)
    if not callable(scorer):
        raise TypeError(f"a scorer must be a callable or a file, got {type(scorer).__name__}")
    _scorers[name] = scorer
    return scorer


def find_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ValueError: if none is registered.
    """
    if name not in _scorers:
        known = f"; registered are {', '.join(sorted(_scorers))}" if _scorers else ""
        raise ValueError(
            f"score 'learned:{name}' needs a trained scorer: call dit_accel.register_scorer({name!r}, 'gate.safetensors') "
            f"first (examples/learned_gate.py trains one){known}"
        )
    return _scorers[name]


def missing_scorer(method: Method) -> str | None:
    """The name of the scorer that a method needs and that is not registered, or ``None``."""
    spec = parse_spec(method.score)
    if spec.name != "learned":
        return None
    name = str(spec.args[0] if spec.args else spec.kwargs["name"])
    return None if name in _scorers else name
