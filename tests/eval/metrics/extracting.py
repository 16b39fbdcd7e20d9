"""Weights for tests: from the cache, else fetched, else the test is skipped with the reason."""

from __future__ import annotations

from functools import cache

import pytest

from dit_accel_eval import extractors


@cache
def _fetched(name: str) -> str | None:
    try:
        extractors.setup([name])
    except (extractors.MissingExtractorError, OSError) as error:
        return str(error)
    return None


def need(*names: str) -> None:
    """Skip the test unless these weights can be had."""
    for name in names:
        reason = _fetched(name)
        if reason is not None:
            pytest.skip(f"no weights {name}: {reason}")
