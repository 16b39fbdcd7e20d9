"""The commands by themselves: ``python -m dit_accel_eval.cli``, which is what ``torchrun -m`` can start."""

from __future__ import annotations

import typer

from dit_accel_eval.cli import register

app = typer.Typer(help="Evaluation of accelerated diffusion transformers.", no_args_is_help=True, add_completion=False)
register(app)

if __name__ == "__main__":
    app(prog_name="dit-accel")
