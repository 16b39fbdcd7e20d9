"""Profiles: what calibration found about a pipeline, as files that can be read, shared and used again.

:class:`Profile` is the content, ``files`` its format, ``fingerprint`` which model it is for, ``adapt`` its use on another
grid, ``hub`` its way to the Hugging Face Hub and back.
"""

from dit_accel.profiles.adapt import ProfileControl, check_models, fit
from dit_accel.profiles.fingerprint import Fingerprint, fingerprint
from dit_accel.profiles.profile import ANY_BRANCH, ComponentProfile, ErrorCurve, Profile

__all__ = [
    "ANY_BRANCH",
    "ComponentProfile",
    "ErrorCurve",
    "Fingerprint",
    "Profile",
    "ProfileControl",
    "check_models",
    "fingerprint",
    "fit",
]
