"""Makes the helpers of this folder importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from problem import Problem, make_problem


@pytest.fixture(scope="session")
def problem() -> Problem:
    return make_problem()
