"""The processes that the tests of this folder start import its module by this name, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", minversion="0.36")
sys.path.insert(0, str(Path(__file__).parent))
