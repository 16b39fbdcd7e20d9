"""Profiles of an invented model, and a tiny random Wan pipeline of 5 x 8 x 8 = 320 tokens that takes prompts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from made import Prompted, make_pipe, make_profile

from dit_accel.profiles import Profile


@pytest.fixture
def profile() -> Profile:
    return make_profile()


@pytest.fixture
def pipe() -> Prompted:
    return make_pipe()
