"""Attention kernels for diffusion transformers: sparse, dense with its normaliser, and what a planner needs to know.

Importing this package imports no triton; kernels are loaded when a tensor on a GPU first needs them.
"""

from __future__ import annotations

from .backends import choose_backend, self_test, why_not
from .block_mass import attention_lse, block_mass
from .block_sparse import block_sparse_attention
from .dense import dense_attention, dense_kernel, lse_merge
from .lists import gathered_from_mask, levels_from_lists, lists_from_levels, pack_bits, unpack_bits
from .permute import PermutedPool, invert_order, permute_and_pool, permute_tokens, unpermute_tokens
from .pyramid import Pyramid, pyramid, pyramid_groups
from .scores import antidiagonal_scores, sample_blocks, sampled_scores, subblock_scores
from .stats import BlockStats, block_stats
from .types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = [
    "BlockLists",
    "BlockStats",
    "GatheredKeys",
    "PermutedPool",
    "Pooled",
    "Pyramid",
    "TokenOrder",
    "TokenWindows",
    "antidiagonal_scores",
    "attention_lse",
    "block_mass",
    "block_sparse_attention",
    "block_stats",
    "choose_backend",
    "dense_attention",
    "dense_kernel",
    "gathered_from_mask",
    "invert_order",
    "levels_from_lists",
    "lists_from_levels",
    "lse_merge",
    "pack_bits",
    "permute_and_pool",
    "permute_tokens",
    "pyramid",
    "pyramid_groups",
    "sample_blocks",
    "sampled_scores",
    "self_test",
    "subblock_scores",
    "unpack_bits",
    "unpermute_tokens",
    "why_not",
]
