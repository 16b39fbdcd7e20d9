"""Whether sparse attention is faster than dense attention on this device at this length; measured once, then remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel._version import __version__
from dit_accel.adapter import StepInfo
from dit_accel.cost.measure import Timer, measure, wall_time
from dit_accel.cost.store import Cost, CostKey, CostStore
from dit_accel.geometry import TokenGeometry
from dit_accel.logging import get_logger
from dit_accel.method import Method
from dit_accel.planner import Planner
from dit_accel.policy import Policy
from dit_accel_kernels import attention_lse

__all__ = ["CostModel", "PayCall", "bucket", "switched_off"]

_logger = get_logger(__name__)

#: Environment variable that switches the cost model off.
VARIABLE = "DIT_ACCEL_COST_MODEL"
#: Share of the time that has to be saved; what is less cannot be told from noise.
MARGIN = 0.03
_UNKNOWN_STEPS = 20
_UNKNOWN_DENSITY = 0.5


def switched_off() -> bool:
    """Whether ``DIT_ACCEL_COST_MODEL`` says ``off``, ``0``, ``false`` or ``no``."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("off", "0", "false", "no")


def bucket(tokens: int) -> int:
    """The nearest of two to the power of a half integer: lengths that share a measurement differ by 19 % at most."""
    return round(2 ** (round(2 * math.log2(tokens)) / 2))


@dataclass(frozen=True, eq=False)
class PayCall:
    """One attention call that is asked about.

    Attributes:
        query: ``[B, H, S, D]`` in natural order.
        key: like ``query``.
        value: like ``query``.
        key_valid: bool ``[B, S]`` or ``None``.
        scale: factor of the logits, or ``None``.
        geometry: where the tokens sit.
        step: where the call stands.
        backend: kernel backend.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_valid: Tensor | None
    scale: float | None
    geometry: TokenGeometry
    step: StepInfo
    backend: str


class CostModel:
    """Says whether a method pays, over a whole run: dense steps, sparse steps and planning.

    A shape is measured at its first call, on the tensors of that call, as the self-test of a backend is made; after that
    the answer comes from memory or from disk.

    Args:
        store: where times are kept.
        timer: tells the milliseconds of a function.
        devices: types of device that it is asked on. Times on a processor that does other things besides say little.
    """

    def __init__(
        self, store: CostStore | None = None, timer: Timer = wall_time, devices: tuple[str, ...] = ("cuda",)
    ) -> None:
        self._store = CostStore() if store is None else store
        self._timer = timer
        self._devices = devices
        self._answers: dict[tuple[Hashable, ...], str | None] = {}

    def why_not(self, planner: Planner, policy: Policy, call: PayCall) -> str | None:
        """Why sparse attention does not pay for a call, or ``None``."""
        device = call.query.device
        if device.type not in self._devices or switched_off():
            return None
        query = call.query
        asked = (planner.method, query.shape, query.dtype, device, call.backend, call.step.steps)
        if asked not in self._answers:
            key = _key(planner.method, call)
            cost = self._store.get(key)
            if cost is None:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return None  # nothing can be timed while a graph is recorded
                cost = self._measure(planner, call)
                self._store.put(key, cost)
            self._answers[asked] = _answer(cost, policy, call, key)
        return self._answers[asked]

    @torch.no_grad()
    def _measure(self, planner: Planner, call: PayCall) -> Cost:
        lse = None
        if planner.method.needs_lse:
            lse = attention_lse(call.query, call.key, scale=call.scale, key_valid=call.key_valid)
        ctx = planner.context(
            call.query,
            call.key,
            call.value,
            lse,
            call.geometry,
            density=_nominal_density(planner.method),
            scale=call.scale,
            key_valid=call.key_valid,
        )
        cost = measure(planner, ctx, call.value, backend=call.backend, timer=self._timer)
        _logger.info("%d tokens, %d heads: measured %s", call.query.shape[2], call.query.shape[1], cost)
        return cost


def _nominal_density(method: Method) -> float:
    """Mean density of sparse steps where the method says it; otherwise half of the map, which few methods exceed."""
    if method.density is None:
        return _UNKNOWN_DENSITY
    return sum(method.density) / 2 if isinstance(method.density, tuple) else method.density


def _key(method: Method, call: PayCall) -> CostKey:
    batch, heads, tokens, head_dim = call.query.shape
    device = call.query.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slots = {k: v for k, v in method.to_dict().items() if k not in ("name", "summary", "paper", "density")}
    digest = hashlib.sha256(json.dumps(slots, sort_keys=True).encode()).hexdigest()[:12]
    return CostKey(
        device=name,
        backend=call.backend,
        dtype=str(call.query.dtype).removeprefix("torch."),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        tokens=bucket(tokens),
        method=digest,
        versions=_versions(),
    )


def _versions() -> str:
    from dit_accel.env import versions

    found = versions()
    return f"torch {torch.__version__}, triton {found['triton']}, dit_accel {__version__}"


def _answer(cost: Cost, policy: Policy, call: PayCall, key: CostKey) -> str | None:
    steps = call.step.steps or _UNKNOWN_STEPS
    dense, sparse, plans = policy.course(steps)
    spent = dense * cost.dense + sparse * cost.at(_nominal_density(policy.method)) + plans * cost.plan
    share = spent / (steps * cost.dense)
    if share <= 1 - MARGIN:
        return None
    tokens = call.query.shape[2]
    return (
        f"sparse attention does not pay at {tokens} tokens: {share:.2f} of the time of dense attention over the run, "
        f"measured on {key.device} ({key.backend})"
    )
