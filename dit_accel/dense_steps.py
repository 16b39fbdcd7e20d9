"""Where the dense steps of a run lie whose number follows from the work that was asked for."""

from __future__ import annotations

from functools import lru_cache

from dit_accel.compensate.residual import without_residual
from dit_accel.method import Method

__all__ = ["with_dense_steps"]

_LATER = 1.2  # gaps grow over the run: outputs change most at its beginning
_EPS = 1e-3
_USUAL = 0.3  # work of a run of which nothing else is known
_FEWEST = 4  # what is kept for more than a quarter of a run is too old


@lru_cache(maxsize=256)
def with_dense_steps(method: Method, run_density: float | None, steps: int | None) -> Method:
    """The method with plans, and so dense steps, as often as the work allows; see :attr:`Method.dense_share`.

    Where it allows fewer than four of them, or nobody knows, a method with ``compensate="residual:..."`` keeps no residual.

    Args:
        method: with plans that are made on dense steps; any other is returned as it is.
        run_density: work of the run over that of a dense run; ``None`` counts as 0.3.
        steps: denoising steps, or ``None`` where they are not known.
    """
    if not method.dense_share:
        return method
    count = round(method.dense_share * (_USUAL if run_density is None else run_density) * (steps or 0))
    if steps is None or count < _FEWEST:
        return method.replace(compensate=without_residual(method.compensate), pictures=method.pictures)
    shares = (((i / count) ** _LATER * steps + _EPS) / steps for i in range(1, count))
    return method.replace(refresh=tuple(min(share, 1.0) for share in shares), pictures=method.pictures)
