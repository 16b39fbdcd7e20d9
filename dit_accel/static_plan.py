"""Static plans: orders and masks found once, offline, and used for every run (PAROAttention, Sliding Tile Attention)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_accel._files import write_whole
from dit_accel.adapter import StepInfo
from dit_accel.choice import CHOICES
from dit_accel.compensate import make_compensation
from dit_accel.geometry import TokenGeometry
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.pattern_search import candidate_levels, window_recall
from dit_accel.plan import Plan
from dit_accel.planner import Planner
from dit_accel.score import SCORES, Scores, block_scores
from dit_accel.selection import select
from dit_accel_kernels.lists import unpack_bits

if TYPE_CHECKING:
    from dit_accel.runtime import ModelRun

__all__ = ["Recorder", "StaticPlan"]

_FORMAT = "dit_accel.static_plan"
_VERSION = 1


@dataclass(eq=False)
class StaticPlan:
    """Orders per head and masks per step of one transformer at one geometry.

    Attributes:
        method: the method it was made for.
        model: transformer class name.
        geometry: where the tokens sit.
        steps: denoising steps of the calibration runs.
        head_choice: int32 ``[L, H]``, candidate order of each head.
        bits: int32 ``[M, L, H, Qb, W]``, packed masks; see :meth:`mask_index`.
        windows: int32 ``[M, L, H]``, the candidate window of each head where the method has a pattern, else ``None``.
    """

    method: Method
    model: str
    geometry: TokenGeometry
    steps: int
    head_choice: Tensor
    bits: Tensor
    windows: Tensor | None = None
    _plans: dict[int, Plan] = field(default_factory=dict, repr=False)
    _plans_of: tuple[int, torch.device] | None = field(default=None, repr=False)

    def mask_index(self, step: StepInfo) -> int:
        """Mask of a step: each step of the first share has its own, the rest share the last.

        A run with another number of steps uses the masks of the same share of the run.
        """
        if step.step is not None and step.steps:
            place = step.step / step.steps
        else:
            place = step.progress or 0.0
        return min(int(place * self.steps + 1e-6), self.bits.shape[0] - 1)

    def why_not(self, geometry: TokenGeometry | str, layer: int, heads: int) -> str | None:
        """Reason why the plan does not serve a call, or ``None``."""
        if heads != self.head_choice.shape[1]:
            return f"the static plan was made for {self.head_choice.shape[1]} heads, this layer has {heads}"
        if geometry != self.geometry:
            return f"the static plan was made for {self.geometry}, this run has {geometry}"
        if layer >= self.bits.shape[1]:
            return f"the static plan has {self.bits.shape[1]} layers, this is layer {layer}"
        return None

    def plan(
        self,
        planner: Planner,
        geometry: TokenGeometry,
        layer: int,
        step: StepInfo,
        device: torch.device,
    ) -> Plan:
        """The plan of a layer at a step, on ``device``; only the current step's are kept there."""
        index = self.mask_index(step)
        if self._plans_of != (index, device):
            self._plans.clear()
            self._plans_of = (index, device)
        if layer not in self._plans:
            layout = planner.layout(geometry, device)
            kept = self.bits[index, layer][None]
            tokens = geometry.tokens
            visited = int(unpack_bits(kept, -(-tokens // self.method.block_k)).sum())  # on the CPU, once a step
            bits = kept.to(device, non_blocking=True)
            mask = BlockMask(bits, None, tokens, tokens, self.method.block_q, self.method.block_k, visited)
            order = layout.order(self.head_choice[layer].to(device, non_blocking=True))
            self._plans[layer] = Plan(
                mask=mask,
                order=order,
                key_order=order,
                order_names=layout.names,
                windows=None,
                compensation=make_compensation(self.method.compensate),
                density=mask.density(),
                cost=0.0,
                precision=planner.method.precision_rule.fixed,
            )
        return self._plans[layer]

    def save(self, path: str | Path) -> None:
        """Write safetensors with JSON metadata, atomically."""
        meta = {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method.to_dict(),
            "model": self.model,
            "geometry": [self.geometry.grid, self.geometry.prefix, self.geometry.suffix],
            "steps": self.steps,
        }
        tensors = {"head_choice": self.head_choice, "bits": self.bits}
        if self.windows is not None:
            tensors["windows"] = self.windows
        data = save(tensors, {"plan": json.dumps(meta)})
        write_whole(path, data)

    @classmethod
    def load(cls, path: str | Path) -> StaticPlan:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is corrupt, not a static plan, or of a newer version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no static plan at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("plan", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a readable static plan: {error}") from None
        return cls._from_parts(str(path), meta, tensors)

    @classmethod
    def _from_parts(cls, path: str, meta: Any, tensors: dict[str, Tensor]) -> StaticPlan:
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a static plan of dit_accel")
        if meta["version"] > _VERSION:
            raise ValueError(f"{path} has version {meta['version']}, this dit_accel reads up to {_VERSION}")
        try:
            grid, prefix, suffix = meta["geometry"]
            geometry = TokenGeometry(tuple(grid), prefix, suffix)
            method = Method.from_dict(meta["method"])
            held = tensors["head_choice"], tensors["bits"], tensors.get("windows")
            plan = cls(method, meta["model"], geometry, meta["steps"], *held)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is a static plan with parts missing: {error!r}") from None
        rows = -(-geometry.tokens // method.block_q)
        columns = -(-geometry.tokens // method.block_k)
        words = -(-columns // 32)
        if plan.bits.ndim != 5 or tuple(plan.bits.shape[3:]) != (rows, words):
            raise ValueError(f"{path}: masks must be [M, L, H, {rows}, {words}], got {list(plan.bits.shape)}")
        choice = plan.head_choice
        if choice.ndim != 2 or tuple(choice.shape) != tuple(plan.bits.shape[1:3]):
            raise ValueError(f"{path}: head_choice must be {list(plan.bits.shape[1:3])}, got {list(choice.shape)}")
        if choice.numel() and not 0 <= int(choice.min()) <= int(choice.max()) < len(method.order):
            raise ValueError(f"{path}: head_choice must lie in 0..{len(method.order) - 1}")
        return plan


class Recorder:
    """Watches dense calibration runs and makes a :class:`StaticPlan` of them.

    Two passes: the first finds the order of each head, the second the mass of each block in that
    order. Sums are kept on the CPU.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        #: Runs of each prompt: where there is one order, nothing is chosen before the masks.
        self.phases = ("mask",) if method.is_geometric else ("order", "mask")
        self.phase = self.phases[0]
        self._order_scores: dict[int, Tensor] = {}
        self._mass: dict[tuple[int, int], Tensor] = {}
        self._choice: dict[int, Tensor] = {}
        self._candidates: Tensor | None = None
        self._geometry: TokenGeometry | None = None
        self._steps = 0

    def next_phase(self) -> None:
        """Fix the orders; the runs that follow give the masks."""
        self._choice = {i: s.argmax(0).to(torch.int32) for i, s in self._order_scores.items()}
        self.phase = "mask"

    def observe(
        self,
        run: ModelRun,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        layer: int,
        step: StepInfo,
        geometry: TokenGeometry,
        scale: float | None,
        key_valid: Tensor | None,
    ) -> None:
        """Take in the attention of one layer, ``[B, H, S, D]`` in natural order."""
        if step.step is None or not step.steps:
            raise ValueError("calibration needs a pipeline that tells its steps, got none")
        if self._geometry is not None and geometry != self._geometry:
            raise ValueError(f"calibration runs must share one geometry: {self._geometry}, {geometry}")
        self._geometry, self._steps = geometry, step.steps
        layout = run.planner.layout(geometry, q.device)
        choice = self._choice.get(layer) if self.phase == "mask" else None
        ctx = run.planner.context(
            q,
            k,
            None,
            lse,
            geometry,
            density=self.method.density_at(0.0),
            scale=scale,
            key_valid=key_valid,
            order=None if choice is None else layout.order(choice.to(q.device)),
        )
        if self.phase == "order":
            score = CHOICES.trait(self.method.order_choice, "scores")
            if layout.table is not None and score is not None:
                _add(self._order_scores, layer, score(ctx, layout.table).cpu())
            return
        if self.method.is_geometric and step.step < run.policy.warmup_steps(step.steps):
            return  # its windows are not used there
        found = SCORES.create("mass", ctx) if self.method.is_geometric else block_scores(ctx)
        assert isinstance(found, Scores)
        own = int(self.method.static_share * step.steps)
        _add(self._mass, (min(step.step, own), layer), found.values.mean(0).cpu())

    def finish(self, run: ModelRun) -> StaticPlan:
        """Make the plan.

        Raises:
            ValueError: if no attention was seen.
        """
        if not self._mass or self._geometry is None:
            raise ValueError("calibration saw no attention to plan; reasons: " + str(run.status().reasons))
        geometry, method = self._geometry, self.method
        first, masks = (f(index for index, _ in self._mass) for f in (min, max))
        layers = 1 + max(layer for _, layer in self._mass)
        bits, picked = [], []
        levels_of = self._window_levels if method.is_geometric else self._best_levels
        for index in range(masks + 1):
            # A pattern's warm-up has no masks; those of the first sparse step stand in.
            found = [levels_of(run, self._mass[(max(index, first), layer)]) for layer in range(layers)]
            bits.append(torch.stack([mask.bits[0] for mask, _ in found]))
            picked.append(torch.stack([window for _, window in found]))
        heads = bits[0].shape[1]
        choices = [self._choice.get(layer, torch.zeros(heads, dtype=torch.int32)) for layer in range(layers)]
        windows = torch.stack(picked) if method.is_geometric else None
        return StaticPlan(method, run.model, geometry, self._steps, torch.stack(choices), torch.stack(bits), windows)

    def _best_levels(self, run: ModelRun, mass: Tensor) -> tuple[BlockMask, Tensor]:
        """The mask that the selection makes of block mass ``[H, Qb, Kb]``; no window is chosen."""
        assert self._geometry is not None
        method, tokens = self.method, self._geometry.tokens
        forced = run.planner.layout(self._geometry, torch.device("cpu")).forced
        levels, _ = select(method.select, mass[None], method.density_at(0.0), forced)
        mask = BlockMask.from_levels(levels, tokens, tokens, method.block_q, method.block_k)
        return mask, torch.zeros(len(mass), dtype=torch.int32)

    def _window_levels(self, run: ModelRun, mass: Tensor) -> tuple[BlockMask, Tensor]:
        """The candidate window of each head that keeps most of its block mass ``[H, Qb, Kb]``."""
        assert self._geometry is not None
        method, tokens = self.method, self._geometry.tokens
        if self._candidates is None:
            self._candidates = candidate_levels(run.planner, self._geometry, mass.shape[0])
        window = window_recall(mass, self._candidates).argmax(0)
        levels = self._candidates[window][None]
        return BlockMask.from_levels(levels, tokens, tokens, method.block_q, method.block_k), window.to(torch.int32)


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
