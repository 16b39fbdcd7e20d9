"""What stops an evaluation, in words for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["EvalError", "writing"]

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class EvalError(ValueError):
    """The evaluation cannot go on. What is finished is kept; the message is for the user."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error of the file system which file it was about and that nothing finished is lost.

    Raises:
        EvalError: the disk is full, or ``path`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EvalError(
                f"no space left on the device while writing {path}; all finished samples are kept: "
                "free some space and run the same command again"
            ) from error
        raise EvalError(f"cannot write {path}: {error.strerror or error}; all finished samples are kept") from error
