"""What the commands share: reading lists and pairs, and saying what went wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = [
    "STOPPED",
    "check_writable",
    "default_prompts",
    "failing",
    "numbers",
    "pairs",
    "parse_size",
    "print_error",
    "table",
    "words",
]

#: Exit code of a command that was stopped with Ctrl-C, as shells have it.
STOPPED = 130


def print_error(message: object) -> None:
    """One line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False, style="red")


@contextmanager
def failing(stopped: str = "stopped") -> Iterator[None]:
    """Turn errors into one line and exit code 2, and Ctrl-C into ``stopped`` and its own code."""
    try:
        yield
    except typer.Exit:  # a RuntimeError by its base, but no error
        raise
    except KeyboardInterrupt:
        print_error(stopped)
        raise typer.Exit(STOPPED) from None
    except ModuleNotFoundError as error:
        print_error(f"{error.name} is missing: pip install 'dit-accel[diffusers,eval]'")
        raise typer.Exit(2) from None
    except OSError as error:
        print_error(error if error.filename is None else f"{error.filename}: {error.strerror}")
        raise typer.Exit(2) from None
    except (ValueError, RuntimeError) as error:
        print_error(error)
        raise typer.Exit(2) from None


def check_writable(path: Path) -> None:
    """Make the folder of a file to come.

    Raises:
        ValueError: if it cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def words(text: str | None) -> list[str] | None:
    """Parts between commas; ``None`` stays."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, kind: type, what: str) -> list[Any]:
    """Numbers between commas.

    Raises:
        ValueError: one is none, or there is none.
    """
    try:
        found = [kind(part) for part in words(text) or []]
    except ValueError:
        raise ValueError(f"{what} must be numbers between commas, such as 0.5,0.3, got {text!r}") from None
    if not found:
        raise ValueError(f"{what} must hold at least one number, got {text!r}")
    return found


def pairs(texts: Sequence[str], what: str) -> dict[str, Any]:
    """``KEY=VALUE`` with JSON values; what is no JSON is text.

    Raises:
        ValueError: a text without ``=``.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{what} takes KEY=VALUE, such as warmup=0.1, got {text!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``HEIGHTxWIDTH`` in pixels; ``None`` stays.

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"size must be HEIGHTxWIDTH in pixels, such as 128x128, got {text!r}")
    return int(height), int(width)


def default_prompts(pipeline: str, given: Path | None) -> Path:
    """The file of prompts: the one given, or the pipeline's own."""
    return given if given is not None else Path(pipeline) / "prompts.txt"


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of the other commands."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, no_wrap=index == 0)
    return made
