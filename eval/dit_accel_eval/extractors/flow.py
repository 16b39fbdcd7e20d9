"""Optical flow by OpenCV's dense inverse search (arXiv 1603.03590), used for motion in place of RAFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_SIDE", "NAME", "missing", "opencv_flow"]

NAME = "opencv-dis-medium"
#: Smaller frames leave OpenCV's coarsest scale without a patch.
MIN_SIDE = 32


def missing() -> str | None:
    """Why it cannot be used here, ``None`` if it can."""
    try:
        import cv2
    except ImportError as error:
        return f"OpenCV cannot be imported ({error}); install opencv-python-headless"
    return None if hasattr(cv2, "DISOpticalFlow_create") else f"OpenCV {cv2.__version__} has no DISOpticalFlow"


def opencv_flow(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Flow ``[H, W, 2]`` in pixels (x, y) from one RGB frame ``[H, W, 3]`` to the next."""
    import cv2

    grey: list[Any] = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (a, b)]
    library: Any = cv2  # its stubs leave this out
    search = library.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow: npt.NDArray[np.float32] = search.calc(grey[0], grey[1], None)
    return flow
