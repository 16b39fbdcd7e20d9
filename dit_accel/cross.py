"""Cross-attention of dense steps kept for the sparse steps that follow (FreeSwim, arXiv 2511.14712).

A window sees a part of the picture only, and its queries ask the text for the wrong things; what the dense pass asked for
keeps the meaning of the whole. The paper runs a dense and a window pass at once and lets the first override the second's
cross-attention; its cheaper variant, which this is, keeps what the latest dense step gave.
"""

from __future__ import annotations

from torch import Tensor

from dit_accel._specs import parse_spec

__all__ = ["CrossCache"]


class CrossCache:
    """Outputs of cross-attention by layer and guidance branch, one ``[B, S, C]`` tensor for each.

    Args:
        spec: ``cross_attention`` of a method: ``"live"``, ``"cached"`` or ``"cached:BRANCH"``.

    Attributes:
        wanted: whether the integration has to hand over outputs of cross-attention at all.
    """

    def __init__(self, spec: str) -> None:
        parsed = parse_spec(spec)
        self.wanted = parsed.name == "cached"
        self._branch = str(parsed.args[0]) if parsed.args else None
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._sparse: set[int] = set()

    def note(self, layer: int, *, sparse: bool) -> None:
        """Say how the latest self-attention of a layer was computed."""
        (self._sparse.add if sparse else self._sparse.discard)(layer)

    def override(self, layer: int, branch: str, output: Tensor) -> Tensor:
        """What stands for the output of the cross-attention of a layer.

        Args:
            layer: number of the self-attention in the same block.
            branch: guidance branch of the call.
            output: what the model computed, ``[B, S, C]``.

        Returns:
            ``output`` after dense self-attention, which is kept; after sparse self-attention what was kept last for this
            layer and branch, if it has the same shape, dtype and device.
        """
        if not self.wanted or (self._branch is not None and branch != self._branch):
            return output
        if layer not in self._sparse:
            self._kept[layer, branch] = output.detach()
            return output
        kept = self._kept.get((layer, branch))
        if kept is None or (kept.shape, kept.dtype, kept.device) != (output.shape, output.dtype, output.device):
            return output
        return kept

    def clear(self) -> None:
        """Forget what was kept: the run is over."""
        self._kept.clear()
        self._sparse.clear()
