"""Logging of dit_accel: standard library; warnings are shown where nobody set up logging, each reason once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable

__all__ = ["get_logger", "set_verbosity", "warn_once"]

_ROOT = logging.getLogger("dit_accel")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_FORMAT = "%(name)s: %(message)s"
_said: set[Hashable] = set()


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """Warnings on standard error where the program has set up no logging: Python's last resort, with our name."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, unless a handler of the root logger does."""
        if not logging.getLogger().handlers and sys.stderr is not None:
            self.stream = sys.stderr  # as it is now: programs exchange it
            super().emit(record)


_unheard = _LastResort(logging.WARNING)
_unheard.setFormatter(logging.Formatter(_FORMAT))
_ROOT.addHandler(_unheard)


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name`` below the ``dit_accel`` root."""
    return logging.getLogger(name)


def set_verbosity(level: str | int) -> None:
    """Show messages of dit_accel from ``level`` on, on standard error.

    Without it warnings are shown, unless the program has set up logging of its own, which then decides.

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
    _ROOT.removeHandler(_unheard)
    if not any(isinstance(h, logging.StreamHandler) for h in _ROOT.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        _ROOT.addHandler(handler)


def warn_once(logger: logging.Logger, key: Hashable, message: str) -> None:
    """Log ``message`` as a warning the first time that ``key`` is seen in this process."""
    if key not in _said:
        _said.add(key)
        logger.warning(message)


if os.environ.get("DIT_ACCEL_LOG_LEVEL"):
    set_verbosity(os.environ["DIT_ACCEL_LOG_LEVEL"])
