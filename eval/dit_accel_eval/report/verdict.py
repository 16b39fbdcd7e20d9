"""What the run says about each method, in numbers and in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel_eval.report.describe import describe
from dit_accel_eval.report.folder import DENSE, Row, Run, Sample, number

__all__ = ["Verdict", "floor_samples", "judge", "mean", "worst_first"]

METRIC = "psnr"
#: How far the work of a run may lie from what was asked for without being mentioned.
_TOLERANCE = 0.02
#: Metrics that do not say how far a clip is from dense, so that another seed is no floor for them.
_NO_DISTANCE = ("flicker_difference",)


@dataclass(frozen=True)
class Verdict:
    """One configuration against dense attention.

    Attributes:
        row: the configuration.
        samples: how many were made.
        planned: how many should be.
        work: attention work over dense work, whole run, planning included, mean over samples.
        speedup: dense denoising time over its own, over the samples that both have.
        seconds: denoising time of one clip, mean.
        psnr: mean over samples, in dB.
        worst: the sample with the lowest PSNR.
        above_floor: samples that are nearer to dense than the clip of another seed.
        judged: samples that have a floor to be compared with.
        margin: least distance to the floor over the judged samples, in dB.
        failure: why the first failed sample failed, ``None`` if none did.
        below: other metrics in which it is further from dense than another seed, means over common samples.
    """

    row: Row
    samples: int
    planned: int
    work: float | None
    speedup: float | None
    seconds: float | None
    psnr: float | None
    worst: Sample | None
    above_floor: int
    judged: int
    margin: float | None
    failure: str | None = None
    below: tuple[str, ...] = ()

    @property
    def clears_floor(self) -> bool | None:
        """Whether every judged sample lies above the floor; ``None`` where there is nothing to judge."""
        return None if self.judged == 0 else self.above_floor == self.judged

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if not self.samples:
            return f"No sample was made: {self.failure}" if self.failure else "No sample was made."
        partly = f"Over {self.samples} of {self.planned} samples only:" if self.samples < self.planned else ""
        parts = [partly, _saved(self.work, self.speedup), _missed(self), _quality(self), _floor(self)]
        return " ".join(part for part in parts if part)


def _saved(work: float | None, speedup: float | None) -> str:
    if work is None:
        saved = "Attention work was not recorded"
    elif work > 1:
        saved = f"Does {work - 1:.0%} more attention work than dense"
    else:
        saved = f"Saves {1 - work:.0%} of the attention work of the run, planning included"
    if speedup is None:
        return saved + "; its time cannot be compared."
    if speedup >= 1:
        return saved + f", and {1 - 1 / speedup:.0%} of the denoising time ({speedup:.2f} times as fast)."
    return saved + f", but takes {1 / speedup - 1:.0%} longer ({speedup:.2f} times as fast)."


def _missed(verdict: Verdict) -> str:
    """Whether the work of the run is not what was asked for."""
    asked = number(verdict.row.options.get("run_density"))
    if asked is None or verdict.work is None or abs(verdict.work - asked) <= _TOLERANCE:
        return ""
    return f"It was asked for {asked:.3g} of the dense work and did {verdict.work:.3g}."


def _quality(verdict: Verdict) -> str:
    worst = verdict.worst
    if verdict.psnr is None or worst is None:
        return "PSNR was not measured."
    low = worst.metrics[METRIC]
    return f"PSNR {verdict.psnr:.1f} dB; worst prompt “{worst.prompt}” (seed {worst.seed}) at {low:.1f} dB."


def _floor(verdict: Verdict) -> str:
    if verdict.clears_floor is None or verdict.margin is None:
        return "There is no floor to compare it with."
    if verdict.clears_floor:
        least = f"{verdict.margin:.1f}" if verdict.margin >= 0.1 else f"{verdict.margin:.2g}"
        said = f"Clears the floor of dense with another seed on every sample, by at least {least} dB."
    elif verdict.above_floor == 0:
        said = "Does not clear the floor: the dense clip of another seed is as near to the dense one."
    else:
        said = f"Clears the floor on {verdict.above_floor} of {verdict.judged} samples only."
    return (
        f"{said} In {', '.join(verdict.below)} it is further from dense than another seed." if verdict.below else said
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there, ``None`` if nothing is."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def floor_samples(run: Run) -> dict[tuple[int, int], float]:
    """PSNR of dense with another seed, by prompt and seed."""
    found = {}
    for row in run.rows:
        if row.floor:
            for sample in run.good(row.name):
                value = sample.metrics.get(METRIC)
                if value is not None:
                    found[sample.key] = value
    return found


def _speedup(run: Run, samples: Sequence[Sample]) -> float | None:
    dense = {s.key: number(s.speed.get("denoise_s")) for s in run.good(DENSE)}
    total, own = 0.0, 0.0
    for sample in samples:
        theirs, mine = dense.get(sample.key), number(sample.speed.get("denoise_s"))
        if theirs is not None and mine is not None:
            total, own = total + theirs, own + mine
    return total / own if own > 0 and total > 0 else None


def _below_floor(run: Run, row: Row) -> tuple[str, ...]:
    """Metrics, other than PSNR, whose mean is worse than the floor's over the samples that both have."""
    floor = {s.key: s for r in run.rows if r.floor for s in run.good(r.name)}
    pairs = [(s.metrics, floor[s.key].metrics) for s in run.good(row.name) if s.key in floor]
    found = []
    for name in dict.fromkeys(name for own, _ in pairs for name in own):
        about = describe(name)
        values = [
            (a, b) for own, other in pairs if (a := own.get(name)) is not None and (b := other.get(name)) is not None
        ]
        if not values or not about.known or name in (METRIC, *_NO_DISTANCE):
            continue
        gain = sum(own - other for own, other in values)
        if (gain < 0) == about.higher_is_better and gain != 0:
            found.append(name)
    return tuple(found)


def _judge_row(run: Run, row: Row, floor: dict[tuple[int, int], float]) -> Verdict:
    samples = run.good(row.name)
    measured = [(s, s.metrics[METRIC]) for s in samples if s.metrics.get(METRIC) is not None]
    pairs = [(s, float(value)) for s, value in measured if value is not None]
    margins = [value - floor[s.key] for s, value in pairs if s.key in floor]
    return Verdict(
        row=row,
        samples=len(samples),
        planned=len(run.expected_keys),
        work=mean([number(s.engine.get("density")) for s in samples]),
        speedup=_speedup(run, samples),
        seconds=mean([number(s.speed.get("denoise_s")) for s in samples]),
        psnr=mean([value for _, value in pairs]),
        worst=min(pairs, key=lambda pair: pair[1])[0] if pairs else None,
        above_floor=sum(margin > 0 for margin in margins),
        judged=len(margins),
        margin=min(margins) if margins else None,
        below=_below_floor(run, row),
        failure=next((s.error for s in run.samples.get(row.name, ()) if s.error is not None), None),
    )


def judge(run: Run) -> list[Verdict]:
    """Verdicts of all accelerated configurations, the best PSNR first, those without one last."""
    floor = floor_samples(run)
    found = [_judge_row(run, row, floor) for row in run.rows if row.accelerated]
    return sorted(found, key=lambda verdict: -math.inf if verdict.psnr is None else verdict.psnr, reverse=True)


def worst_first(run: Run) -> list[tuple[tuple[int, int], float | None]]:
    """Prompt and seed of each sample with the lowest PSNR that an accelerated configuration has there, lowest first."""
    lowest: dict[tuple[int, int], float] = {}
    for row in run.rows:
        for sample in run.good(row.name) if row.accelerated else []:
            value = sample.metrics.get(METRIC)
            if value is not None:
                lowest[sample.key] = min(value, lowest.get(sample.key, math.inf))
    keys = sorted(run.expected_keys, key=lambda key: (lowest.get(key, math.inf), key))
    return [(key, lowest.get(key)) for key in keys]
