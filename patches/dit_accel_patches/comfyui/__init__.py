"""ComfyUI nodes: sparse attention through ComfyUI's own attention override.

Nothing of ComfyUI is imported before a node runs, so that the package can be imported and tested without it.
"""

from __future__ import annotations

from dit_accel_patches.comfyui.mappings import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
