"""Networks and tools that metrics look through: pinned weights, fetched once, checked at each reading.

Every result that depends on one carries its id, a key of :data:`WEIGHTS`. ``setup`` fetches, ``missing`` says why one
cannot be used, and the modules of this package hold the architectures.
"""

from __future__ import annotations

from dit_accel_eval.extractors.cache import MissingExtractorError, cache_dir, missing
from dit_accel_eval.extractors.fetch import setup
from dit_accel_eval.extractors.weights import WEIGHTS, Archive, Weights

__all__ = ["WEIGHTS", "Archive", "MissingExtractorError", "Weights", "cache_dir", "digests", "missing", "setup"]


def digests() -> dict[str, str]:
    """SHA-256 of each extractor's weights by id, for reports."""
    return {name: weights.sha256 for name, weights in WEIGHTS.items()}
