"""Importing every module of a package, so that a new file in a slot's folder registers itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

__all__ = ["import_all"]


def import_all(package: str, path: Sequence[str]) -> None:
    """Import the modules of ``package`` whose names do not begin with an underscore, in the order of their names."""
    for found in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        if not found.name.startswith("_"):
            importlib.import_module(f"{package}.{found.name}")
