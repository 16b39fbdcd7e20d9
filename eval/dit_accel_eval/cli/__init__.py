"""Commands of the evaluation: ``eval``, ``bench``, ``report``, ``inspect``. Importing them imports no optional library."""

from __future__ import annotations

import typer

from dit_accel_eval.cli.bench import bench_command
from dit_accel_eval.cli.evaluate import eval_app
from dit_accel_eval.cli.show import inspect_command, report_command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.add_typer(eval_app, name="eval")
    app.command("bench")(bench_command)
    app.command("report")(report_command)
    app.command("inspect")(inspect_command)
