"""Logging of dit_accel: standard library, silent by default, each reason said once."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable

__all__ = ["get_logger", "set_verbosity", "warn_once"]

_ROOT = logging.getLogger("dit_accel")
_ROOT.addHandler(logging.NullHandler())
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_said: set[Hashable] = set()


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name`` below the ``dit_accel`` root."""
    return logging.getLogger(name)


def set_verbosity(level: str | int) -> None:
    """Show messages of dit_accel from ``level`` on, on standard error.

    Args:
        level: ``"debug"``, ``"info"``, ``"warning"``, ``"error"`` or a level of :mod:`logging`. The environment variable
            ``DIT_ACCEL_LOG_LEVEL`` does the same at import.

    Raises:
        ValueError: for an unknown level.
    """
    if isinstance(level, str):
        if level.lower() not in _LEVELS:
            raise ValueError(f"verbosity must be one of {', '.join(_LEVELS)}, got {level!r}")
        level = _LEVELS[level.lower()]
    _ROOT.setLevel(level)
    if not any(isinstance(h, logging.StreamHandler) for h in _ROOT.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _ROOT.addHandler(handler)


def warn_once(logger: logging.Logger, key: Hashable, message: str) -> None:
    """Log ``message`` as a warning the first time that ``key`` is seen in this process."""
    if key not in _said:
        _said.add(key)
        logger.warning(message)


if os.environ.get("DIT_ACCEL_LOG_LEVEL"):
    set_verbosity(os.environ["DIT_ACCEL_LOG_LEVEL"])
