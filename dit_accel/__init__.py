"""Sparse attention for diffusion transformers: one line, measured quality.

import dit_accel
handle = dit_accel.enable(pipe)      # skip the attention that does not matter
video = pipe(prompt).frames
print(dit_accel.status(pipe))        # what was computed, what stayed dense and why
handle.disable()                     # the original objects, by identity
"""

from typing import TYPE_CHECKING, Any

from dit_accel._version import __version__
from dit_accel.adapter import Adapter, StepInfo
from dit_accel.api import (
    Handle,
    calibrate,
    disable,
    enable,
    enabled,
    methods,
    status,
    supported_models,
)
from dit_accel.blend import Blend
from dit_accel.functional import block_sparse_attention
from dit_accel.gate import Gate, GateInfo
from dit_accel.geometry import TokenGeometry
from dit_accel.learned import BlockFeatures, register_scorer
from dit_accel.ledger import LayerStatus, RunStatus
from dit_accel.logging import set_verbosity
from dit_accel.mask import BlockMask
from dit_accel.method import Method
from dit_accel.presets import register_method
from dit_accel.simulator import Proposal, Simulation, propose, simulate
from dit_accel.static_plan import StaticPlan

if TYPE_CHECKING:
    from dit_accel.profiles import Profile

__all__ = [
    "Adapter",
    "Blend",
    "BlockFeatures",
    "BlockMask",
    "Gate",
    "GateInfo",
    "Handle",
    "LayerStatus",
    "Method",
    "Profile",
    "Proposal",
    "RunStatus",
    "Simulation",
    "StaticPlan",
    "StepInfo",
    "TokenGeometry",
    "__version__",
    "block_sparse_attention",
    "calibrate",
    "disable",
    "enable",
    "enabled",
    "methods",
    "propose",
    "register_method",
    "register_scorer",
    "set_verbosity",
    "simulate",
    "status",
    "supported_models",
]


def __getattr__(name: str) -> Any:
    """What few programs need, loaded when asked for, so that the import stays lean."""
    if name == "Profile":
        from dit_accel.profiles import Profile

        return Profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
