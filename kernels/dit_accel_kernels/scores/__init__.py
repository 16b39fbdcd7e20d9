"""Cheap estimates of which key blocks a query block looks at: antidiagonals, samples and sub-block means.

All three are logits between few vectors for each query block and few for each key block, reduced over each key block. The
reduction is one operator (:func:`.reduce.block_logits`): a product whose result is never stored.
"""

from __future__ import annotations

from .antidiagonal import antidiagonal_scores
from .sampled import sample_blocks, sampled_scores
from .subblock import subblock_scores

__all__ = ["antidiagonal_scores", "sample_blocks", "sampled_scores", "subblock_scores"]
