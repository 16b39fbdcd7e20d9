"""Attention-level error of a method: every sparse call is compared with dense attention on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel import runtime
from dit_accel.context import valid_in_block_order
from dit_accel.plan import Plan
from dit_accel_kernels import block_mass, dense_attention, permute_tokens


@dataclass
class Probe:
    """Sums on the device; read them with :meth:`summary`."""

    errors: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Means over calls."""
        if not self.errors:
            return {}
        return {
            "attention_rel_l1": float(torch.stack(self.errors).mean()),
            "recalled_mass": float(torch.stack(self.recalls).mean()),
            "attention_calls": len(self.errors),
        }


def recall(plan: Plan, q: Tensor, k: Tensor, lse: Tensor, scale: float | None, key_valid: Tensor | None) -> Tensor:
    """True softmax mass in the exact blocks of a plan, 0-dim; partial blocks count whole."""
    if plan.parts:
        parts = [
            recall(
                p,
                q[i : i + 1],
                k[i : i + 1],
                lse[i : i + 1],
                scale,
                None if key_valid is None else key_valid[i : i + 1],
            )
            for i, p in enumerate(plan.parts)
        ]
        return torch.stack(parts).mean()
    keys = k if plan.key_order is None else permute_tokens(k, plan.key_order)
    mass = block_mass(
        q,
        keys,
        lse,
        block_q=plan.mask.block_q,
        block_k=plan.mask.block_k,
        scale=scale,
        order=plan.order,
        key_valid=valid_in_block_order(key_valid, plan.key_order),
    )
    return (mass * (plan.mask.levels() > 0)).sum(-1).mean()


@contextmanager
def probing() -> Iterator[Probe]:
    """Within the block every sparse attention call of this process is measured."""
    probe, original = Probe(), runtime.execute_with_lse

    def measured(plan: Plan, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, found = original(plan, q, k, v, **options)
        scale, valid = options["scale"], options["key_valid"]
        dense, lse = dense_attention(q, k, v, scale=scale, key_valid=valid)
        probe.errors.append((out.float() - dense.float()).abs().sum() / dense.float().abs().sum())
        probe.recalls.append(recall(plan, q, k, lse, scale, valid))
        return out, found

    runtime.execute_with_lse = measured
    try:
        yield probe
    finally:
        runtime.execute_with_lse = original
