"""Prompts from a file: one a line, or JSON such as VBench's list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel_eval.runs.errors import EvalError

__all__ = ["CALIBRATION_PROMPTS", "read_prompts", "split_prompts"]

#: Prompts that a static method is calibrated on, as PAROAttention does (arXiv 2506.16054).
CALIBRATION_PROMPTS = 2

# Keys of a JSON object that hold its prompt; the first is VBench's.
_KEYS = ("prompt_en", "prompt")


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts: a text file has one a line, blank lines and lines that begin with ``#`` are left out.

    A ``.json`` file holds a list of prompts, or of objects with ``prompt_en`` (VBench's ``VBench_full_info.json``) or
    ``prompt``.

    Raises:
        EvalError: no such file, a file that cannot be read, or one without a prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise EvalError(f"no prompts at {path}; give --prompts FILE with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path} cannot be read as a text of prompts: {error}") from None
    found = _from_json(path, text) if path.suffix == ".json" else _from_lines(text)
    if not found:
        raise EvalError(f"{path} has no prompt; it must hold one a line")
    return found


def _from_lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _from_json(path: Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvalError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, list):
        raise EvalError(f"{path} must hold a list of prompts, got {type(data).__name__}")
    return [_prompt_of(path, index, item) for index, item in enumerate(data)]


def _prompt_of(path: Path, index: int, item: Any) -> str:
    value = next((item[key] for key in _KEYS if key in item), None) if isinstance(item, dict) else item
    if not isinstance(value, str) or not value.strip():
        raise EvalError(f"{path}: item {index} must be a prompt or an object with {' or '.join(_KEYS)}, got {item!r}")
    return value.strip()


def split_prompts(prompts: Sequence[str], limit: int | None, apart: int) -> tuple[list[str], list[str]]:
    """The first ``limit`` prompts, and up to ``apart`` of those behind them that are not among them.

    Raises:
        EvalError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit must be at least 1 prompt, got {limit}")
    chosen = list(prompts[:limit])
    others = [prompt for prompt in dict.fromkeys(prompts[len(chosen) :]) if prompt not in chosen]
    return chosen, others[:apart]
