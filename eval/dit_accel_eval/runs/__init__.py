"""Runs of an evaluation: settings, samples, resuming, processes, summary. :func:`evaluate` does it all."""

from __future__ import annotations

from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.loop import evaluate
from dit_accel_eval.runs.observer import Observer
from dit_accel_eval.runs.options import EvalOptions
from dit_accel_eval.runs.ranks import Ranks

__all__ = ["EvalError", "EvalOptions", "Observer", "Ranks", "evaluate"]
