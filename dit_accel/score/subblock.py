"""Log-sum-exp of pairs of sub-block means (SubBlock, sgl-project/sglang pull 34148)."""

from __future__ import annotations

from dit_accel.context import PlanContext
from dit_accel.score._registry import SCORES, Scores
from dit_accel_kernels import subblock_scores


def _cost(method: object, geometry: object) -> float:
    parts = SCORES.argument(getattr(method, "score", "subblock"), 1, "parts")
    blocks = getattr(method, "block_q", 64) * getattr(method, "block_k", 64)
    return float(0.5 * parts**2 / blocks) if isinstance(parts, int) else 0.0


@SCORES.register("subblock", cost=_cost)
def subblock(ctx: PlanContext, parts: int = 4) -> Scores:
    """Softmax of ``log sum_ab exp(scale * mean(Q_ia) . mean(K_jb))`` over ``parts`` sub-blocks of each block.

    The softmax over the key blocks changes no ranking of a row; it makes the values an estimate of softmax mass.

    Raises:
        ValueError: if a block is no multiple of ``parts``.
    """
    logits = subblock_scores(
        ctx.query,
        ctx.keys,
        block_q=ctx.block_q,
        block_k=ctx.block_k,
        parts=parts,
        scale=ctx.scale,
        order=ctx.order,
        key_valid=ctx.valid,
    )
    ctx.spend(0.5 * parts**2 / (ctx.block_q * ctx.block_k))
    return Scores(logits.softmax(-1), is_mass=True)
