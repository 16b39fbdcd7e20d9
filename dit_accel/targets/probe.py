"""How much of dense attention's output is lost at several densities, measured on sampled query blocks.

The masks are those that the engine itself would use at each density: order, scores, selection and remainder count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.compensate import Compensation, make_compensation
from dit_accel.context import PlanContext
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.plan import Plan, execute
from dit_accel.score import SCORES, Scores
from dit_accel.targets.sampled import sampled_levels
from dit_accel_kernels import dense_attention, permute_tokens
from dit_accel_kernels.types import TokenOrder

__all__ = ["DENSITIES", "Probe", "Sample", "measure_at", "why_not_probed"]

#: Densities at which errors are measured.
DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75)
_LEAST_ROWS, _MOST_ROWS = 8, 16


def why_not_probed(method: Method) -> str | None:
    """Why errors at several densities cannot be measured for a method, or ``None``."""
    if method.is_geometric:
        return f"score={method.score!r} is a pattern, which has no blocks to choose"
    if not method.keeps_density:
        return f"select={method.select!r} has no density that could be chosen"
    if method.has_levels or SCORES.trait(method.score, "gathers", False):
        return f"score={method.score!r} with select={method.select!r} gathers keys besides blocks"
    if method.content_order is not None:
        return f"order {method.content_order!r} depends on the tokens of each batch element"
    compensation = make_compensation(method.compensate)
    kind = type(compensation)
    if kind.prepare is not Compensation.prepare or kind.settle is not Compensation.settle:
        return f"compensate={method.compensate!r} keeps something for every row of a plan, of which a sample is no part"
    return None


@dataclass(frozen=True, eq=False)
class Sample:
    """The query blocks that are looked at.

    Attributes:
        blocks: int64 ``[R]``, query blocks in block order; whole ones, none of which sees every key anyway.
        tokens: int64 ``[H|1, R * block_q]``, their tokens in natural order.
        share: of all query tokens.
    """

    blocks: Tensor
    tokens: Tensor
    share: float

    @classmethod
    def of(cls, ctx: PlanContext) -> Sample | None:
        """Evenly spread blocks of a context whose order is chosen, a sixteenth of them within limits.

        ``None`` where every whole block is forced.
        """
        whole, device = ctx.query.shape[2] // ctx.block_q, ctx.query.device
        number = whole - ctx.forced.row_count  # at least so many are free; the host does not know which
        if number < 1:
            return None
        count = min(max(number // 16, _LEAST_ROWS), _MOST_ROWS, number)
        free = ctx.forced.rows[:whole].to(torch.uint8).argsort(stable=True)
        place = (torch.arange(count, device=device) * number + number // 2) // count
        blocks = free[place]
        inside = torch.arange(ctx.block_q, device=device)
        positions = (blocks[:, None] * ctx.block_q + inside).flatten()
        tokens = positions[None]
        if ctx.order is not None:
            tokens = ctx.order.table.index_select(0, ctx.order.head).long()[:, positions]
        return cls(blocks, tokens, len(positions) / ctx.query.shape[2])

    def rows(self, x: Tensor) -> Tensor:
        """The sampled tokens of ``[B, H, S, ...]`` in natural order, ``[B, H, R * block_q, D]``."""
        index = self.tokens[None, :, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
        return x.gather(2, index)


@dataclass(eq=False)
class Probe:
    """Sampled plans of one layer at several densities, usable at later steps.

    Attributes:
        densities: rising, below 1.
        sample: what they hold.
        plans: one for each density, for the sampled queries against all keys.
        order: token order of keys and values.
    """

    densities: tuple[float, ...]
    sample: Sample
    plans: list[Plan]
    order: TokenOrder | None

    @classmethod
    def of(cls, ctx: PlanContext, names: tuple[str, ...], scores: Scores, densities: Sequence[float]) -> Probe | None:
        """Make the sampled plans; ``None`` where nothing can be sampled.

        Args:
            ctx: with its order chosen.
            names: candidate orders.
            scores: block scores of the context.
            densities: rising, above 0 and below 1.
        """
        sample = Sample.of(ctx)
        if sample is None:
            return None
        method, length = ctx.method, len(sample.blocks) * ctx.block_q
        found = sampled_levels(
            method.select, scores.values, densities, ctx.forced, sample.blocks, _expanded(scores.insist, scores.values)
        )
        plans = []
        for levels in found:
            mask = BlockMask.from_levels(levels, length, ctx.key.shape[2], ctx.block_q, ctx.block_k)
            plans.append(
                Plan(
                    mask=mask,
                    order=None,  # the sampled queries come in block order
                    key_order=ctx.key_order,
                    order_names=names,
                    windows=None,
                    compensation=make_compensation(method.compensate),
                    density=mask.density(),
                    cost=0.0,
                )
            )
        return cls(tuple(densities), sample, plans, ctx.key_order)

    def errors(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dense: Tensor | None,
        *,
        scale: float | None,
        key_valid: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """Squared errors and squared outputs, summed over the sample.

        Args:
            query: ``[B, H, S, D]`` in natural order.
            key: like ``query``.
            value: like ``query``.
            dense: output of dense attention ``[B, H, S, D]``, or ``None`` to compute it for the sample.
            scale: factor of the logits; ``None`` is ``D ** -0.5``.
            key_valid: bool ``[B, S]`` in natural order, or ``None``.
            backend: kernel backend, or ``None`` to choose.

        Returns:
            float32 ``[D, H]`` and ``[H]``.
        """
        rows = self.sample.rows(query).contiguous()
        if dense is None:
            wanted = dense_attention(rows, key, value, scale=scale, key_valid=key_valid)[0].float()
        else:
            wanted = self.sample.rows(dense).float()
        plans = self.plans
        if self.order is not None and key_valid is None:  # once for all; a mask has to follow the order of each head
            key, value = permute_tokens(key, self.order), permute_tokens(value, self.order)
            plans = [dataclasses.replace(plan, key_order=None, bias=None) for plan in plans]
        found = []
        for plan in plans:
            out = execute(plan, rows, key, value, scale=scale, key_valid=key_valid, backend=backend)
            found.append((out.float() - wanted).square().sum((0, 2, 3)))
        return torch.stack(found), wanted.square().sum((0, 2, 3))

    @property
    def work(self) -> float:
        """Work of :meth:`errors` with the dense output given, in dense attentions."""
        return self.sample.share * sum(self.densities)


def measure_at(
    ctx: PlanContext,
    names: tuple[str, ...],
    scores: Scores,
    *,
    densities: Sequence[float] = DENSITIES,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Errors of a context at several densities, see :meth:`Probe.errors`, counted in its cost.

    ``None`` where nothing can be sampled.
    """
    if ctx.value is None:
        raise ValueError("errors of attention need the values, and the caller of the planner gave none")
    probe = Probe.of(ctx, names, scores, densities)
    if probe is None:
        return None
    ctx.spend(probe.work + (probe.sample.share if ctx.dense_out is None else 0.0))
    return probe.errors(
        ctx.query,
        ctx.key,
        ctx.value,
        ctx.dense_out,
        scale=ctx.scale,
        key_valid=ctx.key_valid,
        backend=backend,
    )


def _expanded(insist: Tensor | None, scores: Tensor) -> Tensor | None:
    return None if insist is None else insist.expand(scores.shape)
