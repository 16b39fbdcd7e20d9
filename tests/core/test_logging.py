"""Warnings reach a user who set up no logging, and leave one who did alone."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

import pytest

from dit_accel.logging import get_logger


def test_a_warning_is_shown_without_any_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest has put its own there
    get_logger("dit_accel.test").warning("stays dense")
    get_logger("dit_accel.test").info("not so important")
    assert capsys.readouterr().err == "dit_accel.test: stays dense\n"


def test_a_program_with_handlers_of_its_own_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    get_logger("dit_accel.test").warning("stays dense")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("level", "shown"), [("info", ["one", "two"]), ("error", [])])
def test_verbosity_replaces_that_and_says_each_thing_once(level: str, shown: list[str]) -> None:
    program = f"""
    import dit_accel
    from dit_accel.logging import get_logger
    dit_accel.set_verbosity({level!r})
    get_logger("dit_accel.test").info("one")
    get_logger("dit_accel.test").warning("two")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr.splitlines() == [f"dit_accel.test: {text}" for text in shown]
