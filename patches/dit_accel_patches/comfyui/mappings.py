"""The nodes by name, in the form that every version of ComfyUI reads."""

from __future__ import annotations

from dit_accel_patches.comfyui.node_accelerate import AccelerateAttention
from dit_accel_patches.comfyui.node_profile import Calibrate, LoadProfile, SaveProfile
from dit_accel_patches.comfyui.node_report import CompareWithDense, Statistics

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "DitAccelAccelerate": AccelerateAttention,
    "DitAccelLoadProfile": LoadProfile,
    "DitAccelSaveProfile": SaveProfile,
    "DitAccelCalibrate": Calibrate,
    "DitAccelStatistics": Statistics,
    "DitAccelCompare": CompareWithDense,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DitAccelAccelerate": "Accelerate Attention (dit_accel)",
    "DitAccelLoadProfile": "Load Profile (dit_accel)",
    "DitAccelSaveProfile": "Save Profile (dit_accel)",
    "DitAccelCalibrate": "Calibrate (dit_accel)",
    "DitAccelStatistics": "Statistics (dit_accel)",
    "DitAccelCompare": "Compare with Dense (dit_accel)",
}
