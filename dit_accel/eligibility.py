"""Which attention calls can be served at all, and by which kernel backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.compensate import make_compensation
from dit_accel.geometry import TokenGeometry
from dit_accel.masked import corrects_output, keeps_head_orders
from dit_accel.method import Method
from dit_accel.pattern import PATTERNS
from dit_accel.precision import serving
from dit_accel.static_plan import StaticPlan
from dit_accel_kernels import choose_backend
from dit_accel_kernels.backends import require_backend
from dit_accel_kernels.quantize import Precision

__all__ = ["Eligibility"]


class Eligibility:
    """Reasons why a call stays dense whatever the schedule.

    Args:
        method: what to do.
        backend: kernel backend, or ``None`` for the best that passes its self-test.
        min_tokens: shorter sequences stay dense.
        static: plan of a static method.
    """

    def __init__(self, method: Method, backend: str | None, min_tokens: int, static: StaticPlan | None) -> None:
        self.method, self.asked, self.min_tokens, self.static = method, backend, min_tokens, static
        self._backends: dict[tuple[Any, ...], tuple[str, str | None]] = {}
        self._fitted: dict[tuple[Any, ...], Method] = {}
        self._precisions: dict[tuple[Any, ...], tuple[str, Precision | None, str]] = {}

    def why_dense(
        self,
        query: Tensor,
        key: Tensor,
        key_valid: Tensor | None,
        layer: int,
        geometry: TokenGeometry,
        *,
        calibrating: bool,
    ) -> str | None:
        """Reason for which the method cannot serve a call with ``[B, S, H, D]`` tensors, or ``None``."""
        tokens = query.shape[1]
        reason = geometry.check(tokens)
        if reason is not None:
            return reason
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens={self.min_tokens}"
        if geometry.grid is None and self._needs_grid:
            return f"method {self.method.name!r} needs a grid, the geometry is {geometry}"
        if query.requires_grad and torch.is_grad_enabled():
            return "gradients are needed, sparse attention is for inference"
        if self.method.static and not calibrating:
            if self.static is None:
                return f"method {self.method.name!r} needs a plan from calibrate()"
            reason = self.static.why_not(geometry, layer, query.shape[2])
        return reason or self._why_not_keys(key, key_valid, geometry)

    def _why_not_keys(self, key: Tensor, key_valid: Tensor | None, geometry: TokenGeometry) -> str | None:
        """Reason why keys or their mask cannot be served, or ``None``."""
        tokens, compensate = geometry.tokens, self.method.compensate
        if key.shape[1] < tokens:
            return f"{key.shape[1]} keys are fewer than the {tokens} tokens of the geometry"
        if key.shape[1] > tokens and corrects_output(make_compensation(compensate)):
            return f"compensate={compensate!r} corrects the output, which cannot be joined with that of further keys"
        content = self.method.content_order is not None
        fixed = content or (self.method.static and len(self.method.order) > 1)
        if key_valid is not None and fixed and not keeps_head_orders(self.method):
            return f"a key mask cannot follow the order of each head with compensate={compensate!r}"
        return None

    @property
    def _needs_grid(self) -> bool:
        """Whether the method cannot do without frames, height and width."""
        if self.method.is_geometric and PATTERNS.trait(self.method.score, "needs_grid", True):
            return True
        return self.method.order != ("raster",) and self.method.content_order is None

    def backend(self, query: Tensor) -> tuple[str, str | None]:
        """The kernel backend for this device, dtype and head size, and why it is not good enough, or ``None``.

        Raises:
            ValueError: if the backend that was asked for cannot run here.
            RuntimeError: if it failed its self-test.
        """
        need = self._need(query)
        key = tuple(need.values())
        if key not in self._backends:
            if self.asked is not None:
                require_backend(self.asked, **need)
                self._backends[key] = (self.asked, None)
            else:
                name, reasons = choose_backend(**need)
                told = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
                missing = f"no fast backend ({told})" if name == "reference" else None
                self._backends[key] = (name, missing)
        return self._backends[key]

    def fitted(self, asked: Method, query: Tensor) -> Method:
        """The method with the block sizes of the kernel that will serve such queries, see :attr:`Method.hopper_blocks`."""
        if asked.hopper_blocks is None or query.device.type != "cuda" or self.asked not in (None, "hopper"):
            return asked
        key = (asked, query.device, query.dtype, query.shape[-1])
        if key not in self._fitted:
            method = asked.replace(block_q=asked.hopper_blocks[0], block_k=asked.hopper_blocks[1])
            name, _ = choose_backend(**self._need(query, method))
            self._fitted[key] = method if name == "hopper" else asked
        return self._fitted[key]

    def _need(self, query: Tensor, method: Method | None = None) -> dict[str, Any]:
        """What a backend is chosen by."""
        method = self.method if method is None else method
        return {
            "device": query.device,
            "dtype": query.dtype,
            "head_dim": query.shape[-1],
            "block_q": method.block_q,
            "block_k": method.block_k,
        }

    def precision(self, query: Tensor, backend: str) -> tuple[str, Precision | None, str]:
        """Number formats of sparse calls of such queries, by name, and why ``"auto"`` found none.

        Args:
            query: its device, dtype and head size count.
            backend: the 16-bit backend in force.

        Returns:
            ``"bf16"`` and ``None`` for 16 bits; the reason is empty unless ``precision="auto"`` found no kernel.

        Raises:
            ValueError: if the formats were named, and no kernel computes them here.
        """
        rule = self.method.precision_rule
        if rule.wide:
            return "bf16", None, ""
        need = self._need(query)
        key = (*need.values(), backend)
        if key not in self._precisions:
            named = ((rule.text, rule.fixed),) if rule.fixed is not None else rule.candidates
            reasons = []
            for name, precision in named:
                reason = serving(precision, backend, **need)[1]
                if reason is None:
                    self._precisions[key] = (name, precision, "")
                    return self._precisions[key]
                reasons.append(f"{name}: {reason}")
            told = "; ".join(reasons)
            if rule.fixed is not None:
                raise ValueError(f"precision={rule.text!r} cannot be used here, use 'bf16' or 'auto' ({told})")
            self._precisions[key] = ("bf16", None, f"precision={rule.text!r} is 16 bit here ({told})")
        return self._precisions[key]
