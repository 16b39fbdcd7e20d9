"""What :func:`dit_accel.enable` was asked for besides a method: a quality, a target or a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dit_accel.targets.control import Control, ErrorControl
from dit_accel.targets.named import QUALITIES, Target, parse_target, stock_curve

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.profiles import Profile
    from dit_accel.static_plan import StaticPlan

__all__ = ["Granted", "Wish"]


@dataclass(frozen=True)
class Granted:
    """How a wish is met.

    Attributes:
        methods: by component.
        controls: by component, ``None`` where there is nothing to control.
        plans: static plans by component.
        warnings: what the user should know.
    """

    methods: dict[str, Method]
    controls: dict[str, Control]
    plans: dict[str, StaticPlan] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """Arguments of :func:`dit_accel.enable` that say what matters instead of how much to compute.

    Attributes:
        quality: name of a target, see :data:`QUALITIES`.
        target_psnr: PSNR against dense, dB.
        target_error: relative L2 error of attention outputs.
        profile: a profile, its file or folder, or its name on the Hub.
    """

    quality: str | None = None
    target_psnr: float | None = None
    target_error: float | None = None
    profile: Profile | str | Path | None = None

    @property
    def given(self) -> list[str]:
        """Names of the arguments that were given."""
        return [
            name for name in ("quality", "target_psnr", "target_error", "profile") if getattr(self, name) is not None
        ]

    def check(self, others: Mapping[str, object]) -> None:
        """Refuse what contradicts the wish.

        Args:
            others: further arguments that say how much to compute, ``None`` where not given.

        Raises:
            ValueError: if more than one thing says how much to compute, or a value is out of range.
        """
        if not self.given:
            return
        several = [name for name in self.given if name != "profile"]
        several += [name for name, value in others.items() if value is not None]
        if len(several) > 1:
            raise ValueError(f"give one of {', '.join(several)}, each of them says how much to compute")
        if self.profile is not None and (set(several) & set(others)):
            raise ValueError(f"a profile says how much to compute; {several[0]} cannot go with it")
        self.target()

    def target(self) -> Target | None:
        """The target, if one was given.

        Raises:
            ValueError: if its name or value is not known.
        """
        if self.quality is not None:
            if self.quality not in QUALITIES:
                raise ValueError(f"quality must be one of {', '.join(map(repr, QUALITIES))}, got {self.quality!r}")
            return parse_target(self.quality)
        if self.target_psnr is not None:
            return _number("target_psnr", "psnr", self.target_psnr, "between 5 and 100 dB")
        if self.target_error is not None:
            ErrorControl(self.target_error)
            return Target("error", float(self.target_error))
        return None

    def grant(self, method: Method, modules: Mapping[str, nn.Module], backend: str | None) -> Granted:
        """Controls for the transformers of a pipeline, without a profile.

        Raises:
            ValueError: if the method cannot be controlled.
        """
        target = self.target()
        if target is None:
            return Granted(dict.fromkeys(modules, method), {})
        reason = ErrorControl.why_not(method)
        if reason is not None:
            raise ValueError(f"{self.given[0]} cannot go with method {method.name!r}: {reason}")
        controls: dict[str, Control] = {}
        warnings = []
        for name, module in modules.items():
            error = target.value
            if target.kind == "psnr":
                curve, warning = stock_curve(type(module).__name__)
                error = curve.error_for(target.value)
                warnings += [] if warning is None else [warning]
            controls[name] = ErrorControl(error, backend=backend)
        return Granted(dict.fromkeys(modules, method), controls, {}, list(dict.fromkeys(warnings)))

    def grant_by_profile(
        self, asked: str | Method | None, modules: Mapping[str, nn.Module], backend: str | None
    ) -> Granted:
        """Methods, controls and plans of a profile, for its own target or the one that was given.

        Raises:
            ValueError: if the profile is for another model or method, or does not hold what the target takes; further what
                :meth:`Profile.load <dit_accel.profiles.Profile.load>` raises.
        """
        from dit_accel.profiles import ProfileControl, check_models
        from dit_accel.profiles.retarget import retarget

        profile, target = _opened(self.profile), self.target()
        name = asked if asked is None or isinstance(asked, str) else asked.name
        if name not in (None, profile.method.name):
            raise ValueError(f"the profile was made for method {profile.method.name!r}, got method={name!r}")
        warnings = check_models(profile, modules)
        if target is not None:
            profile = retarget(profile, target)
        warnings += profile.notes
        methods: dict[str, Method] = {}
        controls: dict[str, Control] = {}
        plans: dict[str, StaticPlan] = {}
        for component, part in profile.components.items():
            dense = tuple(sorted({*profile.method.dense_layers, *part.dense_layers}))
            methods[component] = profile.method.replace(dense_layers=dense) if part.dense_layers else profile.method
            if part.plan is not None and profile.control == "plan":
                plans[component] = part.plan
            elif profile.control == "error" and profile.error is not None:
                controls[component] = ErrorControl(profile.error, backend=backend)
            else:
                controls[component] = ProfileControl(part, methods[component])
        return Granted(methods, controls, plans, warnings)


def _number(name: str, kind: str, value: float, expected: str) -> Target:
    try:
        return parse_target(Target(kind, value))
    except ValueError:
        raise ValueError(f"{name} must be {expected}, got {value!r}") from None


def _opened(profile: Profile | str | Path | None) -> Profile:
    from dit_accel.profiles import Profile
    from dit_accel.profiles.hub import is_repo_id

    if isinstance(profile, Profile):
        return profile
    if not isinstance(profile, str | Path):
        raise TypeError(f"profile must be a Profile, a path or a name on the Hub, got {type(profile).__name__}")
    if isinstance(profile, str) and not Path(profile).exists() and is_repo_id(profile):
        return Profile.from_hub(profile)
    return Profile.load(profile)
