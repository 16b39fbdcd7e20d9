"""What :func:`dit_accel.enable` returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dit_accel.blend import Blend
from dit_accel.ledger import Status
from dit_accel.method import Method
from dit_accel.registry import Installation
from dit_accel.runtime import ModelRun

__all__ = ["Handle"]


class Handle:
    """What :func:`enable` returns: undo, statistics, and a context manager that disables at the end.

    Attributes:
        method: the method in force.
        runs: run state of each transformer, by component name.
    """

    def __init__(self, method: Method, runs: dict[str, ModelRun], installed: dict[str, Installation]) -> None:
        self.method = method
        self.runs = runs
        self._installed = installed

    @property
    def active(self) -> bool:
        """Whether the acceleration is still in place."""
        return bool(self._installed)

    def disable(self, component: str | None = None) -> None:
        """Restore the original objects, of one component or of all. Safe to call twice."""
        for name in [component] if component is not None else list(self._installed):
            if name in self._installed:
                self._installed.pop(name).undo()
                self.runs[name].blends.clear()

    def blend(
        self,
        u: float,
        heads: Mapping[int, Collection[int] | None] | None = None,
        *,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        component: str | None = None,
    ) -> Blend:
        """Blend the output of chosen heads with their values: ``O <- (1 - u) O + u V`` (SoftPAG, arXiv 2506.10978).

        On sparse and on dense calls alike, until :meth:`Blend.remove <dit_accel.blend.Blend.remove>` or :meth:`disable`.
        Several blends are applied one after the other.

        Args:
            u: weight of the values, from 0 to 1. A head with weight 1 attends to nothing but each token itself.
            heads: lists of heads by layer number, ``None`` for all heads of a layer; left out, all heads of all layers.
            steps: denoising steps at which it applies, such as ``range(5, 20)``; left out, all.
            branch: guidance branch, such as ``"uncond"``; left out, all.
            component: one transformer by name; left out, all of them.

        Returns:
            The blend, to remove it.

        Raises:
            ValueError: a value out of range, an unknown component, or a handle that is disabled.
        """
        if component is not None and component not in self._installed:
            raise ValueError(f"component must be one of {', '.join(self._installed) or 'none'}, got {component!r}")
        if not self._installed:
            raise ValueError("this handle is disabled; enable again before blending")
        made = Blend(u, heads, steps=steps, branch=branch)
        runs = [run for name, run in self.runs.items() if component in (None, name) and name in self._installed]
        for run in runs:
            made.check(len(run.layers))
        for run in runs:
            run.blends.append(made)
            made.on_remove(run.forget_blend)
        return made

    def status(self) -> Status:
        """What each transformer computed in its latest run, by component name. Waits for the device.

        As :func:`dit_accel.status`, and also after :meth:`disable`.
        """
        return Status({name: run.status() for name, run in self.runs.items()})

    def stats(self) -> Status:
        """The same as :meth:`status`."""
        return self.status()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        parts = ", ".join(f"{n}: {r.model} ({len(r.layers)} layers)" for n, r in self.runs.items())
        state = "active" if self.active else "disabled"
        return f"<dit_accel.Handle {self.method.name!r} {state}; {parts}>"
