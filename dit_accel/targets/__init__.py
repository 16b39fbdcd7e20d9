"""Asking for a quality instead of a density: errors are measured where plans are made, and densities follow.

:class:`ErrorControl` keeps the relative error of attention below a target; :class:`QualityCurve` says which error gives
which PSNR on a model where that was measured; :func:`parse_target` reads ``"psnr:35"``.
"""

from dit_accel.targets.named import QUALITIES, Target, parse_target, stock_curve
from dit_accel.targets.quality import QualityCurve, QualityPoint

__all__ = ["QUALITIES", "QualityCurve", "QualityPoint", "Target", "parse_target", "stock_curve"]
