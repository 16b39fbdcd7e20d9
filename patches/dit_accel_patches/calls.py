"""Rules for attention calls that are not one plain sequence of known length.

Most transformers call attention with the whole sequence, and the geometry is known before. Here is what the others need. A
rule stands between the operator and the run: it sees every call, tells the run the geometry that the call really has, and
brings queries and keys into the order that the run expects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.adapter import AttentionRun, DenseFn, StepInfo
from dit_accel.geometry import TokenGeometry

__all__ = ["RULES", "CallRule", "make_rule"]

UNKNOWN_LENGTH = "the length of the sequence is not known before the first attention call"


class CallRule:
    """A rule that changes nothing; the base of the others.

    Attributes:
        grouped: whether it takes calls with fewer key heads than query heads.
        geometry: what the run was told last.
        step: the step of the forward call.
    """

    grouped = False

    def __init__(self) -> None:
        self.geometry: TokenGeometry | str = UNKNOWN_LENGTH
        self.step = StepInfo()

    def begin(self, geometry: TokenGeometry | str, step: StepInfo) -> TokenGeometry | str:
        """Start of a forward call; the geometry to begin with."""
        self.geometry, self.step = geometry, step
        return geometry

    def forget(self) -> None:
        """End of a run."""

    def attend(
        self,
        run: AttentionRun,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """One call, ``[B, S, H, D]`` in and out, arguments as of :meth:`AttentionRun.attend`."""
        return run.attend(query, key, value, layer=layer, scale=scale, key_valid=key_valid, dense=dense)


class KeysInFront(CallRule):
    """Keys and values have more tokens than the queries, and these stand in front: ``q = visual, kv = text | visual``.

    Heads of keys that serve several heads of queries are repeated for the sparse call.
    """

    grouped = True

    def attend(
        self,
        run: AttentionRun,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Bring the further keys behind, where the run expects them."""
        more = key.shape[1] - query.shape[1]
        rolled = None if key_valid is None else key_valid.roll(-more, 1)

        def as_given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense(query, key, value)

        heads = query.shape[2] // key.shape[2]
        keys, values = (x.roll(-more, 1).repeat_interleave(heads, 2) for x in (key, value))
        return run.attend(query, keys, values, layer=layer, scale=scale, key_valid=rolled, dense=as_given)


class SampleBySample(CallRule):
    """The model calls attention once a sample of the batch, each with its own number of tokens behind the visual ones.

    The geometry has the longest. Shorter samples get keys that are masked and queries that are thrown away, so that one
    geometry, and for each sample its own plans, serve the run. The operator runs at run time, so counting the calls of a
    layer within a forward call tells the sample, compiled or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, int] = {}
        self._sample = 0

    def begin(self, geometry: TokenGeometry | str, step: StepInfo) -> TokenGeometry | str:
        """Start counting."""
        self._seen.clear()
        self._sample = 0
        return super().begin(geometry, step)

    def attend(
        self,
        run: AttentionRun,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Fill up to the length of the geometry."""
        sample = self._seen.get(layer, 0)
        self._seen[layer] = sample + 1
        if sample != self._sample:
            self._sample = sample
            name = self.step.branch if sample == 0 else f"{self.step.branch}/{sample}"
            run.begin_forward(self.geometry, replace(self.step, branch=name))
        tokens = query.shape[1]
        missing = 0 if isinstance(self.geometry, str) else self.geometry.tokens - tokens
        if missing <= 0 or key_valid is not None:
            return run.attend(query, key, value, layer=layer, scale=scale, key_valid=key_valid, dense=dense)
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
        valid = torch.arange(tokens + missing, device=q.device)[None] < tokens

        def as_given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = dense(query, key, value)
            return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, missing))

        valid = valid.expand(q.shape[0], -1)
        return run.attend(q, k, v, layer=layer, scale=scale, key_valid=valid, dense=as_given)[:, :tokens]


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

    def attend(
        self,
        run: AttentionRun,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Tell the run the length before the call, if it is a new one."""
        tokens = query.shape[1]
        if isinstance(self.geometry, str) or tokens != self.geometry.tokens:
            found = self.stretched(tokens)
            if found is not None:
                self.geometry = self._found[self._base] = found
                run.begin_forward(found, self.step)
        return run.attend(query, key, value, layer=layer, scale=scale, key_valid=key_valid, dense=dense)


class Flat(Elastic):
    """Nothing is known but the calls themselves: the longest self-attention of a forward call is the sequence."""

    def stretched(self, tokens: int) -> TokenGeometry | None:
        """Longer than what this forward call has shown so far."""
        known = 0 if isinstance(self.geometry, str) else self.geometry.tokens
        return TokenGeometry.flat(tokens) if tokens > known else None

    def attend(
        self,
        run: AttentionRun,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Cross-attention is not told apart by its name here, so it is by its shape."""
        if key.shape[1] != query.shape[1]:
            run.decline(layer, f"not self-attention: {query.shape[1]} queries on {key.shape[1]} keys")
            return dense(query, key, value)
        return super().attend(run, layer, query, key, value, scale, key_valid, dense)


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
