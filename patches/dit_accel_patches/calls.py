"""Rules for attention calls that are not one plain sequence of known length.

Most transformers call attention with the whole sequence, and the geometry is known before. Here is what the others need. A
rule stands between the operator and the run: it sees every call, tells the run the geometry that the call really has, and
brings queries and keys into the order that the run expects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.adapter import AttentionRun, DenseFn, StepInfo
from dit_accel.geometry import TokenGeometry

__all__ = ["RULES", "Call", "CallRule", "make_rule"]

UNKNOWN_LENGTH = "the length of the sequence is not known before the first attention call"


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call, arguments as of :meth:`AttentionRun.attend`.

    Attributes:
        layer: index of the layer.
        query: ``[B, S, H, D]``.
        key: like ``query``; a rule may take further keys or fewer heads.
        value: like ``key``.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        key_valid: bool ``[B, S]``, false for padding, or ``None``.
        dense: what to call for dense attention.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    key_valid: Tensor | None
    dense: DenseFn

    def hand_to(self, run: AttentionRun) -> Tensor:
        """Let the run carry it out, ``[B, S, H, D]``."""
        return run.attend(
            self.query,
            self.key,
            self.value,
            layer=self.layer,
            scale=self.scale,
            key_valid=self.key_valid,
            dense=self.dense,
        )


def _as_given(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention on what the model gave, whatever a rule has made of it."""
    return call.dense(call.query, call.key, call.value)


def _longer(x: Tensor, missing: int) -> Tensor:
    """``[B, S, H, D]`` with zeros for ``missing`` tokens behind."""
    return F.pad(x, (0, 0, 0, 0, 0, missing))


class CallRule:
    """A rule that changes nothing; the base of the others.

    Attributes:
        grouped: whether it takes calls with fewer key heads than query heads.
        hands_over: whether a call of a geometry that the run knows goes to it as it is.
        geometry: what the run was told last.
        step: the step of the forward call.
    """

    grouped = False
    hands_over = True

    def __init__(self) -> None:
        self.geometry: TokenGeometry | str = UNKNOWN_LENGTH
        self.step = StepInfo()

    def begin(self, geometry: TokenGeometry | str, step: StepInfo) -> TokenGeometry | str:
        """Start of a forward call; the geometry to begin with."""
        self.geometry, self.step = geometry, step
        return geometry

    def forget(self) -> None:
        """End of a run."""

    def attend(self, run: AttentionRun, call: Call) -> Tensor:
        """One call, ``[B, S, H, D]`` in and out."""
        return call.hand_to(run)


class KeysInFront(CallRule):
    """Keys and values have more tokens than the queries, and these stand in front: ``q = visual, kv = text | visual``.

    Heads of keys that serve several heads of queries are repeated for the sparse call.
    """

    grouped = True
    hands_over = False

    def attend(self, run: AttentionRun, call: Call) -> Tensor:
        """Bring the further keys behind, where the run expects them."""
        more = call.key.shape[1] - call.query.shape[1]
        heads = call.query.shape[2] // call.key.shape[2]
        key, value = (x.roll(-more, 1).repeat_interleave(heads, 2) for x in (call.key, call.value))
        rolled = None if call.key_valid is None else call.key_valid.roll(-more, 1)
        as_given = partial(_as_given, call)
        return replace(call, key=key, value=value, key_valid=rolled, dense=as_given).hand_to(run)


class SampleBySample(CallRule):
    """The model calls attention once a sample of the batch, each with its own number of tokens behind the visual ones.

    The geometry has the longest. Shorter samples get keys that are masked and queries that are thrown away, so that one
    geometry, and for each sample its own plans, serve the run. The operator runs at run time, so counting the calls of a
    layer within a forward call tells the sample, compiled or not.
    """

    hands_over = False

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, int] = {}
        self._sample = 0

    def begin(self, geometry: TokenGeometry | str, step: StepInfo) -> TokenGeometry | str:
        """Start counting."""
        self._seen.clear()
        self._sample = 0
        return super().begin(geometry, step)

    def attend(self, run: AttentionRun, call: Call) -> Tensor:
        """Fill up to the length of the geometry."""
        sample = self._seen.get(call.layer, 0)
        self._seen[call.layer] = sample + 1
        if sample != self._sample:
            self._sample = sample
            name = self.step.branch if sample == 0 else f"{self.step.branch}/{sample}"
            run.begin_forward(self.geometry, replace(self.step, branch=name))
        tokens = call.query.shape[1]
        missing = 0 if isinstance(self.geometry, str) else self.geometry.tokens - tokens
        if missing <= 0 or call.key_valid is not None:
            return call.hand_to(run)
        query, key, value = (_longer(x, missing) for x in (call.query, call.key, call.value))
        valid = (torch.arange(tokens + missing, device=query.device)[None] < tokens).expand(query.shape[0], -1)

        def as_given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _longer(_as_given(call, q, k, v), missing)

        filled = replace(call, query=query, key=key, value=value, key_valid=valid, dense=as_given)
        return filled.hand_to(run)[:, :tokens]


class Elastic(CallRule):
    """A part of the length is known only at the call: text that the model has trimmed by its mask, for one.

    What was found is kept for the forward calls that follow, so the run is told once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[TokenGeometry | str, TokenGeometry] = {}

    def begin(self, geometry: TokenGeometry | str, step: StepInfo) -> TokenGeometry | str:
        """Begin with what the forward call before has found."""
        self._base = geometry
        return super().begin(self._found.get(geometry, geometry), step)

    def forget(self) -> None:
        """The next run may have another length."""
        self._found.clear()

    def stretched(self, tokens: int) -> TokenGeometry | None:
        """The geometry of a call of ``tokens``, ``None`` where the call is none of the sequence."""
        base = self._base
        if isinstance(base, str) or tokens < base.tokens:
            return None
        return replace(base, suffix=base.suffix + tokens - base.tokens)

    def attend(self, run: AttentionRun, call: Call) -> Tensor:
        """Tell the run the length before the call, if it is a new one."""
        tokens = call.query.shape[1]
        if isinstance(self.geometry, str) or tokens != self.geometry.tokens:
            found = self.stretched(tokens)
            if found is not None:
                self.geometry = self._found[self._base] = found
                run.begin_forward(found, self.step)
        return call.hand_to(run)


class Flat(Elastic):
    """Nothing is known but the calls themselves: the longest self-attention of a forward call is the sequence."""

    def stretched(self, tokens: int) -> TokenGeometry | None:
        """Longer than what this forward call has shown so far."""
        known = 0 if isinstance(self.geometry, str) else self.geometry.tokens
        return TokenGeometry.flat(tokens) if tokens > known else None

    def attend(self, run: AttentionRun, call: Call) -> Tensor:
        """Cross-attention is not told apart by its name here, so it is by its shape."""
        queries, keys = call.query.shape[1], call.key.shape[1]
        if keys != queries:
            run.decline(call.layer, f"not self-attention: {queries} queries on {keys} keys")
            return call.dense(call.query, call.key, call.value)
        return super().attend(run, call)


RULES: dict[str, Callable[[], CallRule]] = {
    "keys_in_front": KeysInFront,
    "sample_by_sample": SampleBySample,
    "elastic": Elastic,
    "flat": Flat,
}


def make_rule(name: str) -> CallRule | None:
    """The rule of this name, ``None`` for the empty name.

    Raises:
        ValueError: if there is no such rule.
    """
    if not name:
        return None
    if name not in RULES:
        raise ValueError(f"calls must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]()
