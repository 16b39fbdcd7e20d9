"""From one attention call to maps and rows of attention, in pieces that stay small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_accel.plan import Plan
from dit_accel_eval.inspect.choose import evenly
from dit_accel_eval.inspect.model import Look
from dit_accel_eval.inspect.seam import Call
from dit_accel_kernels import attention_lse, block_mass, permute_tokens
from dit_accel_kernels.types import TokenOrder

__all__ = ["BLOCK", "MOST_ROWS", "measure", "row_count"]

#: Tokens in a block of the maps of calls without a plan.
BLOCK = 64
#: Most query blocks in a map; longer sequences show evenly spread ones.
MOST_ROWS = 192


def row_count(tokens: int, block: int = BLOCK) -> int:
    """Query blocks in a map of so many tokens."""
    return min(MOST_ROWS, -(-tokens // block))


@dataclass(frozen=True, eq=False)
class _Heads:
    """Chosen heads of one batch element.

    Attributes:
        query: ``[1, h, S, D]``.
        key: like ``query``.
        lse: float32 ``[1, h, S]``, over these keys and further ones behind them.
        scale: factor of the logits.
        key_valid: bool ``[1, S]`` or ``None``.
        query_order: order of the queries of the heads.
        key_order: order of their keys.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    key_valid: Tensor | None
    query_order: TokenOrder | None
    key_order: TokenOrder | None


def _of_heads(order: TokenOrder | None, heads: Tensor) -> TokenOrder | None:
    return None if order is None else TokenOrder(order.table, order.head[heads.to(order.head.device)])


def _positions(order: TokenOrder | None, head: int, tokens: int, device: torch.device) -> Tensor:
    """Position in block order of each natural token, int64 ``[S]``."""
    if order is None:
        return torch.arange(tokens, device=device)
    index = order.table[int(order.head[head])].long()
    return torch.empty_like(index).scatter_(0, index, torch.arange(tokens, device=index.device)).to(device)


def _plan_of_last(plan: Plan) -> Plan:
    """The plan of the last batch element."""
    return plan.parts[-1] if plan.parts else plan


def _choose_heads(call: Call, heads: Sequence[int], plan: Plan | None) -> _Heads:
    index = torch.tensor(heads, device=call.query.device)
    # The last of a batch: where guidance shares a batch, the prompt's half comes last.
    shared = index * call.key.shape[2] // call.query.shape[2]  # several query heads may share one of keys
    q = call.query[-1:].index_select(2, index).transpose(1, 2).contiguous()
    k = call.key[-1:].index_select(2, shared).transpose(1, 2).contiguous()
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    valid = None if call.key_valid is None else call.key_valid[-1:]
    lse = attention_lse(q, k, scale=scale, key_valid=valid)
    tokens = q.shape[2]
    orders = (None, None) if plan is None else (plan.order, plan.key_order)
    valid = None if valid is None else valid[:, :tokens]
    return _Heads(q, k[:, :, :tokens].contiguous(), lse, scale, valid, *(_of_heads(order, index) for order in orders))


def _attention_rows(part: _Heads, tokens: Tensor) -> Tensor:
    """Softmax of the sampled queries over all keys, float16 ``[h, n, S]`` on the host, one head at a time."""
    rows = []
    for head in range(part.query.shape[1]):
        logits = part.query[0, head, tokens].float() @ part.key[0, head].float().T * part.scale
        mass = (logits - part.lse[0, head, tokens, None]).exp()
        if part.key_valid is not None:
            mass = mass.masked_fill(~part.key_valid, 0.0)
        rows.append(mass.nan_to_num(0.0).half().cpu())
    return torch.stack(rows)


def _map(part: _Heads, rows: Tensor, blocks: tuple[int, int], ordered: bool) -> Tensor:
    """Mass of the blocks of some rows, float16 ``[h, R, Kb]`` on the host."""
    key, valid = part.key, part.key_valid
    if ordered and part.key_order is not None:
        key = permute_tokens(key, part.key_order)
        valid = None if valid is None else valid[:, part.key_order.table[0].long()]
    mass = block_mass(
        part.query,
        key,
        part.lse,
        block_q=blocks[0],
        block_k=blocks[1],
        scale=part.scale,
        rows=rows,
        order=part.query_order if ordered else None,
        key_valid=valid,
    )
    return mass[0].half().cpu()


def _in_windows(plan: Plan, query_at: Tensor, key_at: Tensor) -> Tensor:
    """Which keys lie in the token windows of some queries, bool ``[n, S]``, given positions in block order."""
    assert plan.windows is not None
    low, high = plan.windows.q_lo[:, query_at], plan.windows.q_hi[:, query_at]  # [3, n]
    code = plan.windows.k_code[:, key_at]  # [3, S]
    inside = ((code[:, None] >= low[..., None]) & (code[:, None] < high[..., None])).all(0)
    return inside | (code[0] < 0)


def _visible(plan: Plan, part: _Heads, heads: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[h, n]`` of the sampled tokens, and packed bits ``[h, n, ceil(S / 8)]`` of what they see."""
    levels = plan.mask.levels()[-1]
    count, device = part.query.shape[2], levels.device
    places, bits = [], []
    for position, head in enumerate(heads):
        query_at = _positions(part.query_order, position, count, device)[tokens.to(device)]
        key_at = _positions(part.key_order, position, count, device)
        level = levels[head if levels.shape[0] > 1 else 0][query_at // plan.mask.block_q][
            :, key_at // plan.mask.block_k
        ]
        seen = level != 0
        if plan.windows is not None:
            seen &= (level == 1) | _in_windows(plan, query_at, key_at)
        places.append(query_at.to(torch.int32).cpu())
        bits.append(torch.from_numpy(np.packbits(seen.cpu().numpy(), axis=-1, bitorder="little")))
    return torch.stack(places), torch.stack(bits)


def _notes(plan: Plan | None, sampled: int, blocks: int, further: int) -> tuple[str, ...]:
    found = []
    if further:
        found.append(f"{further} further keys follow the sequence; their mass is in no map")
    if sampled < blocks:
        found.append(f"the maps show {sampled} of {blocks} query blocks, evenly spread")
    if plan is not None and plan.compensate:
        found.append("blocks that are not computed enter the softmax as one mean key each")
    if plan is not None and plan.gather is not None:
        found.append("further keys are gathered besides the blocks, the maps do not show them")
    if plan is not None and plan.windows is not None:
        found.append("blocks of level 255 are computed within token windows only")
    return tuple(found)


def _order_names(plan: Plan | None, heads: Sequence[int]) -> tuple[str, ...]:
    if plan is None or plan.order is None:
        return ("raster",) * len(heads)
    names, choice = plan.order_names, plan.order.head.tolist()
    return tuple(names[choice[h]] if choice[h] < len(names) else "by content" for h in heads)


def measure(call: Call, *, method: str, component: str, name: str, heads: Sequence[int], tokens: Sequence[int]) -> Look:
    """Maps and attention rows of one call, on the host.

    Args:
        call: the call.
        method: name of the method.
        component: name of the transformer.
        name: module path of the layer.
        heads: indices of heads.
        tokens: sampled query tokens, natural order.
    """
    plan = None if call.plan is None else _plan_of_last(call.plan)
    part = _choose_heads(call, heads, plan)
    device, count = part.query.device, part.query.shape[2]
    blocks = (BLOCK, BLOCK) if plan is None else (plan.mask.block_q, plan.mask.block_k)
    total = -(-count // blocks[0])
    rows = torch.tensor(evenly(total, MOST_ROWS), dtype=torch.int32, device=device)
    at = torch.tensor(tokens, device=device)
    kept = place = visible = None
    if plan is not None:
        levels = plan.mask.levels()[-1]
        chosen = levels[list(heads)] if levels.shape[0] > 1 else levels.expand(len(heads), -1, -1)
        kept = chosen[:, rows.to(levels.device).long()].contiguous().cpu()
        place, visible = _visible(plan, part, heads, at)
    moved = plan is not None and (plan.order is not None or plan.key_order is not None)
    return Look(
        method=method,
        component=component,
        layer=call.layer,
        name=name,
        step=-1 if call.step.step is None else call.step.step,
        timestep=call.step.timestep,
        heads=tuple(heads),
        block_q=blocks[0],
        block_k=blocks[1],
        orders=_order_names(plan, heads),
        dense=call.dense,
        notes=_notes(plan, len(rows), total, call.key.shape[1] - count),
        rows=rows.cpu(),
        raster=_map(part, rows, blocks, ordered=False),
        ordered=_map(part, rows, blocks, ordered=True) if moved else None,
        kept=kept,
        place=place,
        attention=_attention_rows(part, at),
        visible=visible,
    )
