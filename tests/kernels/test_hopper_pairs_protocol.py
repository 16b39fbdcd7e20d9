"""The barriers of the Hopper kernel for pairs of query blocks as a model, in random order of events.

What the kernel computes at a place in the ring is replaced by which tile is there; a wait that is never over, a tile that
is overwritten while it is read, and one that the wrong consumer takes are failures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

_Wait = Callable[[], bool]


@dataclass
class Barrier:
    count: int
    arrived: int = 0
    done: int = 0

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.count:
            self.arrived, self.done = 0, self.done + 1

    def over(self, parity: int) -> bool:
        return self.done % 2 != parity


@dataclass
class Job:
    """Blocks of both rows and what they share, which are tiles here; pooled tiles before them; -1 ends, -2 is none."""

    n: int
    m: int
    common: int
    pooled: int = 0
    number: int = 0

    def shape(self) -> tuple[int, int, int, int]:
        tiles, others = max(self.n - self.common, 1), max(self.m - self.common, 1)
        both = min(tiles, others)
        pooled = 0 if self.number < 0 else self.pooled
        return both + pooled, self.common, tiles - both, others - both

    def sequence(self, w: int) -> list[tuple[int, int, int]]:
        """Tiles that consumer ``w`` takes: (job, whose, which)."""
        turns, shared, *more = self.shape()
        mine = [(self.number, w, t) for t in range(turns)] + [(self.number, 2, t) for t in range(shared)]
        return mine + [(self.number, w, turns + t) for t in range(more[w])]


@dataclass
class Model:
    jobs: list[Job]
    stages: int
    early: int
    rng: random.Random

    def __post_init__(self) -> None:
        self.keys: list[object] = [None] * self.stages
        self.values: list[object] = [None] * self.stages
        self.k_full, self.v_full = ([Barrier(1) for _ in range(self.stages)] for _ in range(2))
        self.empty = [Barrier(2) for _ in range(self.stages)]
        self.q_full, self.q_empty = [Barrier(1), Barrier(1)], [Barrier(1), Barrier(1)]
        self.behind = Barrier(1)
        self.info: list[Job | None] = [None, None]
        self.reading: dict[tuple[str, int], int] = {}
        self.copies: list[Callable[[], None]] = []
        self.taken: list[list[object]] = [[], []]

    def copy(self, what: str, stage: int, tile: object) -> None:
        bars, place = (self.k_full, self.keys) if what == "k" else (self.v_full, self.values)
        assert not self.reading.get((what, stage)), "overwritten while it is read"

        def arrives() -> None:
            assert not self.reading.get((what, stage)), "overwritten while it is read"
            place[stage] = tile
            bars[stage].arrive()

        self.copies.append(arrives)

    def producer(self) -> Iterator[_Wait]:
        stage, phase, q_phase = 0, 0, 1
        todo = [*self.jobs, Job(0, 0, 0, number=-2), Job(0, 0, 0, number=-1)]
        self.info[0] = todo[0]
        for w in range(2):
            self.q_full[w].arrive()
        for i, job in enumerate(todo[:-1]):
            turns, shared, *more = job.shape()
            tiles = [(job.number, x & 1, x // 2) for x in range(2 * turns)]
            tiles += [(job.number, 2, t) for t in range(shared)]
            tiles += [(job.number, w, turns + t) for w in range(2) for t in range(more[w])]
            last = len(tiles)
            for x, tile in enumerate(tiles):
                after, after_phase = self.after(stage, phase)
                yield lambda s=stage, p=phase ^ 1: self.empty[s].over(p)  # type: ignore[misc]
                self.copy("k", stage, tile)
                yield lambda s=after, p=after_phase ^ 1: self.empty[s].over(p)  # type: ignore[misc]
                self.copy("v", stage, tile)
                stage, phase = after, after_phase
                if x == max(last - 4 - self.early, min(last - 1, 8)):
                    for w in range(2):
                        yield lambda w=w, p=q_phase ^ 1: self.q_empty[w].over(p)  # type: ignore[misc]
                    q_phase ^= 1
                    self.info[q_phase ^ 1] = todo[i + 1]
                    for w in range(2):
                        self.q_full[w].arrive()

    def consumer(self, w: int) -> Iterator[_Wait]:
        stage, phase, slot = self.stages - 1, 1, 0
        yield lambda: self.q_full[w].over(0)
        job = self.info[0]
        while job is not None and job.number != -1:
            turns, shared, *more = job.shape()
            n = turns + shared + more[w]
            before: object = None
            if w:
                stage, phase = self.after(stage, phase)
                yield from self.pass_over(stage, phase)
                yield lambda p=slot: self.behind.over(p)  # type: ignore[misc]
            for t in range(n + 1):
                here, here_phase = self.after(stage, phase)
                between = here if 0 < t <= turns - w and t < n else None
                if between is not None:
                    yield lambda s=here, p=here_phase: self.k_full[s].over(p)  # type: ignore[misc]
                    yield lambda s=here, p=here_phase: self.v_full[s].over(p)  # type: ignore[misc]
                    here, here_phase = self.after(here, here_phase)
                if t < n:
                    yield lambda s=here, p=here_phase: self.k_full[s].over(p)  # type: ignore[misc]
                    self.hold("k", here, 1)
                if t > 0:
                    yield lambda s=stage, p=phase: self.v_full[s].over(p)  # type: ignore[misc]
                    self.hold("v", stage, 1)
                yield lambda: True
                if t > 0:
                    assert self.values[stage] == before
                    self.hold("v", stage, -1)
                if t == n:
                    break
                before = self.keys[here]
                self.taken[w].append(before)
                self.hold("k", here, -1)
                self.empty[here].arrive()
                if between is not None:
                    self.empty[between].arrive()
                stage, phase = here, here_phase
                if t == 0:
                    self.q_empty[w].arrive()
                if t == 0 and w == 0:
                    self.behind.arrive()
            for _ in range(more[0] if w else more[1] + (shared == 0 and more[0] == 0)):
                stage, phase = self.after(stage, phase)
                yield from self.pass_over(stage, phase)
            slot ^= 1
            yield lambda p=slot: self.q_full[w].over(p)  # type: ignore[misc]
            job = self.info[slot]

    def after(self, stage: int, phase: int) -> tuple[int, int]:
        return (0, phase ^ 1) if stage == self.stages - 1 else (stage + 1, phase)

    def pass_over(self, stage: int, phase: int) -> Iterator[_Wait]:
        yield lambda: self.k_full[stage].over(phase)
        yield lambda: self.v_full[stage].over(phase)
        self.empty[stage].arrive()

    def hold(self, what: str, stage: int, by: int) -> None:
        self.reading[what, stage] = self.reading.get((what, stage), 0) + by

    def run(self) -> None:
        roles = [self.producer(), self.consumer(0), self.consumer(1)]
        waits: list[_Wait | None] = [next(role) for role in roles]
        while any(waits):
            ready = [i for i, wait in enumerate(waits) if wait is not None and wait()]
            if self.copies and (not ready or self.rng.random() < 0.5):
                self.copies.pop(self.rng.randrange(len(self.copies)))()
                continue
            assert ready, "everybody waits"
            i = self.rng.choice(ready)
            waits[i] = next(roles[i], None)


@pytest.mark.parametrize("stages", [3, 6, 12])
@pytest.mark.parametrize("early", [0, 4])
def test_each_consumer_gets_its_tiles_in_order_and_nobody_waits_for_ever(stages: int, early: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        jobs = []
        for number in range(rng.randint(1, 6)):
            n, m = (rng.choice([0, 1, 2, rng.randint(0, 14)]) for _ in range(2))
            common = rng.randint(0, max(0, min(n, m) - 1))
            jobs.append(Job(n, m, common, rng.choice([0, 0, 3]), number))
        model = Model(jobs, stages, early, rng)
        model.run()
        for w in range(2):
            want = [tile for job in [*jobs, Job(0, 0, 0, number=-2)] for tile in job.sequence(w)]
            assert model.taken[w] == want
