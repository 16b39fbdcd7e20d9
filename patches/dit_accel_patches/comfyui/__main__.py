"""``python -m dit_accel_patches.comfyui PATH``: make an installed package a custom node of the ComfyUI at ``PATH``.

ComfyUI loads nodes from files of ``custom_nodes`` only. This writes one of a few lines that imports the package.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

_FILE = '''"""Nodes of dit_accel, from the installed package. Written by python -m dit_accel_patches.comfyui."""

from dit_accel_patches.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def main(argv: list[str] | None = None) -> int:
    """Write ``custom_nodes/dit_accel_nodes.py``; 2 if there is no ComfyUI at the path."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel_patches.comfyui", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI, the one with main.py")
    folder = parser.parse_args(argv).comfyui / "custom_nodes"
    if not folder.is_dir():
        sys.stderr.write(f"{folder} is not a folder; give the folder of ComfyUI, the one with main.py\n")
        return 2
    path = folder / "dit_accel_nodes.py"
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_FILE)
    os.replace(name, path)
    sys.stdout.write(f"wrote {path}; restart ComfyUI\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
