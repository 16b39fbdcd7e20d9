"""Custom node of ComfyUI, when this repository lies in ``custom_nodes``. Python packages are in the folders beside it.

Only the roots of our own packages become importable, not this folder with its ``tests`` and ``docs``. If something is
missing, the nodes are there all the same and say so when they run.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_ROOT = Path(__file__).resolve().parent
# Name, title and outputs of each node; a test compares them with those of the package.
_NODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DitAccelAccelerate": ("Accelerate Attention (dit_accel)", ("MODEL",)),
    "DitAccelLoadProfile": ("Load Profile (dit_accel)", ("DITACCEL_PROFILE",)),
    "DitAccelSaveProfile": ("Save Profile (dit_accel)", ("STRING",)),
    "DitAccelCalibrate": ("Calibrate (dit_accel)", ("DITACCEL_PROFILE",)),
    "DitAccelStatistics": ("Statistics (dit_accel)", ("STRING", "IMAGE")),
    "DitAccelCompare": ("Compare with Dense (dit_accel)", ("IMAGE", "IMAGE", "IMAGE", "STRING")),
}


def _make_importable() -> None:
    """Add ``kernels`` and ``patches`` to the path; ``dit_accel`` lies in this folder and is registered by itself."""
    for part in ("kernels", "patches"):
        if str(_ROOT / part) not in sys.path:
            sys.path.insert(0, str(_ROOT / part))
    if "dit_accel" in sys.modules:
        return
    place = _ROOT / "dit_accel"
    spec = importlib.util.spec_from_file_location(
        "dit_accel", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} cannot be imported; is the clone complete?")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dit_accel"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["dit_accel"]
        raise


def _broken(reason: str) -> dict[str, type]:
    """Nodes that say what is wrong instead of vanishing."""

    def explain(self: Any, **_: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            f"dit_accel could not be loaded: {reason}. Run: {sys.executable} -m pip install -r {_ROOT}/requirements.txt"
        )

    def inputs(cls: type) -> dict[str, Any]:
        return {"required": {}, "optional": {"model": ("MODEL",)}}

    body = {
        "CATEGORY": "model/patch",
        "FUNCTION": "explain",
        "OUTPUT_NODE": True,
        "DESCRIPTION": f"dit_accel could not be loaded: {reason}",
        "INPUT_TYPES": classmethod(inputs),
        "explain": explain,
    }
    return {name: type(name, (), {**body, "RETURN_TYPES": outputs}) for name, (_, outputs) in _NODES.items()}


NODE_CLASS_MAPPINGS: dict[str, type]
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {name: title for name, (title, _) in _NODES.items()}
try:
    _make_importable()
    from dit_accel_patches.comfyui import NODE_CLASS_MAPPINGS
except Exception as error:
    logging.getLogger("dit_accel").exception("the ComfyUI nodes of dit_accel could not be loaded")
    NODE_CLASS_MAPPINGS = _broken(f"{type(error).__name__}: {error}")
