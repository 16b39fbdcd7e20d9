"""How far the attention of an accelerated run is from dense, by layer, head and step.

At some steps each layer's output is compared with dense attention on the same queries, keys and values, and the exact
softmax mass of the blocks that were computed is added up. One layer is held at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import dit_accel
from dit_accel.context import valid_in_block_order
from dit_accel.plan import Plan
from dit_accel.runtime import ModelRun
from dit_accel_eval.attention import cosine_by_head, recalled_mass, relative_l1_by_head
from dit_accel_eval.generate import generate
from dit_accel_kernels import attention_lse, block_mass, permute_tokens

__all__ = ["AttentionProbe", "probe_attention", "summarise_attention"]

_STEPS = 3
_ROWS = 64
_DIGITS = 6


class AttentionProbe:
    """Compares the sparse calls of some steps with dense attention, for as long as its ``with`` block lasts.

    It puts two attributes on the run object and takes them away again. Only the first guidance branch of a step is
    looked at, and the last element of a batch, which is the prompt's half where guidance shares one.

    Args:
        run: of one transformer.
        steps: steps to look at.
        component: name of the transformer, for the records.
    """

    def __init__(self, run: ModelRun, steps: Iterable[int], component: str = "transformer") -> None:
        self.records: list[dict[str, Any]] = []
        self._run = run
        self._steps = frozenset(steps)
        self._component = component
        self._seen: set[tuple[int, int]] = set()
        self._sparse: tuple[Any, Plan] | None = None

    def __enter__(self) -> AttentionProbe:
        sparse, attend = self._run._sparse, self._run.attend

        def watched(call: Any, plan: Plan) -> Tensor:
            self._sparse = (call, plan)
            return sparse(call, plan)

        def compared(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            self._sparse = None
            out = attend(query, key, value, **kwargs)
            place = (self._run._step.step or 0, int(kwargs["layer"]))
            if self._sparse is not None and place[0] in self._steps and place not in self._seen:
                self._seen.add(place)
                dense = kwargs["dense"](query, key, value)[-1:]  # whole, since it may hold a mask of the batch
                self._compare(*self._sparse, out[-1:], dense, place)
            return out

        self._run.__dict__.update(_sparse=watched, attend=compared)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("_sparse", "attend"):
            self._run.__dict__.pop(name, None)
        self._sparse = None

    def _compare(self, call: Any, plan: Plan, out: Tensor, dense: Tensor, place: tuple[int, int]) -> None:
        """Note one call: outputs are ``[1, S, H, D]``, queries and keys of the call ``[B, H, S, D]``."""
        q, k = call.query[-1:], call.key[-1:]
        valid = None if call.key_valid is None else call.key_valid[-1:]
        # Where orders depend on content, each element of the batch has a plan of its own.
        recall = _recall(plan.parts[-1] if plan.parts else plan, q, k, call.scale, valid)
        density = plan.density.detach().float().mean(0)
        self.records.append(
            {
                "component": self._component,
                "layer": place[1],
                "name": self._run.layers[place[1]] if place[1] < len(self._run.layers) else str(place[1]),
                "step": place[0],
                "rel_l1": _numbers(relative_l1_by_head(out, dense)),
                "cosine": _numbers(cosine_by_head(out, dense)),
                "recall": _numbers(recall),
                "density": _numbers(density.expand(q.shape[1])),
            }
        )


def _recall(plan: Plan, q: Tensor, k: Tensor, scale: float | None, valid: Tensor | None) -> Tensor:
    """Exact softmax mass of the computed blocks by head, over evenly spread query blocks; ``[B, H, S, D]`` in."""
    mask = plan.mask
    blocks = -(-q.shape[2] // mask.block_q)
    count = min(blocks, _ROWS)
    rows = ((torch.arange(count, dtype=torch.float64) + 0.5) * blocks / count).to(torch.int32).to(q.device)
    lse = attention_lse(q, k, scale=scale, key_valid=valid)
    keys = k if plan.key_order is None else permute_tokens(k, plan.key_order)
    mass = block_mass(
        q,
        keys,
        lse,
        block_q=mask.block_q,
        block_k=mask.block_k,
        scale=scale,
        rows=rows,
        order=plan.order,
        key_valid=valid_in_block_order(valid, plan.key_order),
    )
    kept = mask.levels()[-1:, :, rows.long()].expand(-1, q.shape[1], -1, -1)
    return recalled_mass(mass, kept)[0]


def _numbers(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.detach().float().cpu().tolist()]


def _steps_of(run: ModelRun, steps: int) -> list[int]:
    """The first, the middle and the last step that the method's schedule lets be sparse."""
    first, end = run.policy.warmup_steps(steps), run.policy.sparse_end(steps)
    count = min(_STEPS, max(end - first, 0))
    return sorted({first + round(i * (end - 1 - first) / max(count - 1, 1)) for i in range(count)})


def probe_attention(
    pipe: Any, method: str, options: Mapping[str, Any], prompt: str, seed: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Generate one clip accelerated, comparing its attention with dense; not timed and not decoded.

    Returns:
        ``records``, one for each layer and step looked at with numbers by head, and their ``summary``.

    Raises:
        ValueError: the method cannot run, or ``num_inference_steps`` is not among ``call``.
    """
    steps = call.get("num_inference_steps")
    if not isinstance(steps, int):
        raise ValueError("num_inference_steps must be given for attention to be compared at some steps")
    with dit_accel.enabled(pipe, method, **dict(options)) as handle:
        probes = [AttentionProbe(run, _steps_of(run, steps), name) for name, run in handle.runs.items()]
        for probe in probes:
            probe.__enter__()
        try:
            generate(pipe, [prompt], [seed], decode=False, **dict(call))
        finally:
            for probe in probes:
                probe.__exit__(None, None, None)
    records = [record for probe in probes for record in probe.records]
    return {"prompt": prompt, "seed": seed, "summary": summarise_attention(records), "records": records}


def summarise_attention(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means over heads: of everything, by layer and by step; ``None`` where no call was sparse."""
    if not records:
        return None
    names = ("rel_l1", "cosine", "recall", "density")

    def mean(chosen: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {n: round(statistics.fmean(v for record in chosen for v in record[n]), _DIGITS) for n in names}

    layers = dict.fromkeys((record["component"], record["layer"], record["name"]) for record in records)
    steps = sorted({record["step"] for record in records})
    return {
        **mean(records),
        "calls": len(records),
        "by_layer": [
            {"name": key[2], **mean([r for r in records if (r["component"], r["layer"]) == key[:2]])} for key in layers
        ],
        "by_step": {str(step): mean([r for r in records if r["step"] == step]) for step in steps},
    }
