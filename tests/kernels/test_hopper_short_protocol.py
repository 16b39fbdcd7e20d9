"""The barriers of the Hopper kernel for short lists as a model: one producer, two consumers, in random order of events.

A wrong barrier shows on a GPU as a hang, if the timing of that GPU happens to allow it. Here the roles of
``hopper_short.py`` and ``hopper_short_load.py``, reduced to their barriers and to what they hand over, take turns at
random, each with a speed of its own, and the copy engine finishes whenever it likes. A change of the protocol belongs here
as well; without the wait that the last test leaves out, the kernel hung.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

Steps = Generator[None, None, None]


class Barrier:
    """An mbarrier: phases that end after ``count`` arrivals; a wait names the parity of the phase that must have ended."""

    def __init__(self, count: int) -> None:
        self.count, self.left, self.phase = count, count, 0

    def arrive(self) -> None:
        self.left -= 1
        assert self.left >= 0
        if self.left == 0:
            self.left, self.phase = self.count, self.phase + 1

    def wait(self, parity: int) -> Steps:
        while self.phase & 1 == parity & 1:
            yield
        yield


def barriers(many: int, count: int = 1) -> list[Barrier]:
    return [Barrier(count) for _ in range(many)]


@dataclass
class Program:
    """Shared memory of one program, its jobs (tiles of each, 0 for an empty list) and which are wrong at first."""

    jobs: list[int]
    stages: int
    wrong: set[tuple[int, int]]  # job and consumer
    careless: bool = False  # leave out the wait that was forgotten once
    on_the_way: list[tuple[list[object], int, object, Barrier]] = field(default_factory=list)
    done: tuple[list[tuple[int, bool]], ...] = field(default_factory=lambda: ([], []))

    def __post_init__(self) -> None:
        self.k_full, self.v_full = barriers(self.stages), barriers(self.stages)
        self.empty = barriers(self.stages, 2)
        self.q_full, self.q_empty = barriers(2), barriers(2)
        self.behind, self.checked = Barrier(1), Barrier(2)
        self.k: list[object] = [None] * self.stages
        self.v: list[object] = [None] * self.stages
        self.q: list[object] = [None, None]
        self.info: list[tuple[int, int]] = [(-1, 0), (-1, 0)]
        self.failed = [[0, 0], [0, 0]]
        self.again: dict[int, int] = {}

    def after(self, stage: int, phase: int) -> tuple[int, int]:
        return (0, phase ^ 1) if stage == self.stages - 1 else (stage + 1, phase)

    def announce(self, slot: int, job: int, careful: int) -> None:
        self.info[slot] = (job, careful)
        for w in (0, 1):
            if job >= 0:
                self.on_the_way.append((self.q, w, job, self.q_full[w]))
            else:
                self.q_full[w].arrive()

    def collect(self, slot: int, head: int, job: int) -> int:
        if not any(self.failed[slot]):
            return head
        assert job not in self.again
        self.again[job] = head
        return job

    def producer(self) -> Steps:
        stage = phase = q_phase = careful = number = job = before = late = 0
        head = following = -1
        self.announce(0, 0, 0)
        while job >= 0:
            tiles = max(self.jobs[job], 1)
            for t in range(tiles):
                yield from self.empty[stage].wait(phase ^ 1)
                self.on_the_way.append((self.k, stage, (job, t), self.k_full[stage]))
                after, after_phase = self.after(stage, phase)
                yield from self.empty[after].wait(after_phase ^ 1)
                self.on_the_way.append((self.v, stage, (job, t), self.v_full[stage]))
                stage, phase = after, after_phase
                if t == max(tiles - 3, 0):
                    number += 1
                    following = head if careful else number
                    if not 0 <= following < len(self.jobs):
                        following = -1 if careful else -2
                if t == max(tiles - 2, 0) and following != -2:
                    for w in (0, 1):
                        yield from self.q_empty[w].wait(q_phase)
                    q_phase ^= 1
                    if not careful:
                        head = self.collect(q_phase, head, before)
                    elif head >= 0:
                        head = self.again[head]
                    self.announce(q_phase, following, careful)
            late, before, job = before, job, following
            if job == -2:
                job, careful = -1, 2
                for w in (0, 1) if not self.careless else ():
                    yield from self.q_empty[w].wait(q_phase)
                yield from self.checked.wait(q_phase)
                head = self.collect(q_phase ^ 1, head, late)
                head = self.collect(q_phase, head, before)
                if head >= 0:
                    job, head = head, self.again[head]
                q_phase ^= 1
                self.announce(q_phase, job, careful)

    def consumer(self, w: int) -> Steps:
        stage = phase = slot = 0
        yield from self.q_full[w].wait(0)
        (job, careful), query = self.info[0], self.q[w]
        for fast in (True, False):
            while job >= 0 and not (fast and careful > 1):
                assert query == job
                if w == 1:
                    yield from self.behind.wait(slot)
                yield from self.k_full[stage].wait(phase)
                assert self.k[stage] == (job, 0)
                if w == 0:
                    self.behind.arrive()
                yield
                self.empty[stage].arrive()
                yield
                self.q_empty[w].arrive()
                yield
                last = max(self.jobs[job], 1) - 1
                for t in range(last):
                    after, after_phase = self.after(stage, phase)
                    yield from self.k_full[after].wait(after_phase)
                    assert self.k[after] == (job, t + 1)
                    yield from self.v_full[stage].wait(phase)
                    assert self.v[stage] == (job, t)
                    self.empty[after].arrive()
                    stage, phase = after, after_phase
                    yield
                yield from self.v_full[stage].wait(phase)
                if fast:
                    self.failed[slot][w] = int((job, w) in self.wrong)
                    yield
                    self.checked.arrive()
                slot ^= 1
                yield from self.q_full[w].wait(slot)
                (following, careful), query = self.info[slot], self.q[w]
                yield
                assert self.v[stage] == (job, last)
                stage, phase = self.after(stage, phase)
                self.q[w] = "output"
                self.done[w].append((job, fast))
                job = following
                yield


def run(program: Program, rng: random.Random) -> None:
    """Until all have ended; raises if somebody waits for ever or reads what is not his."""
    roles = [program.producer(), program.consumer(0), program.consumer(1)]
    speed = [rng.random() ** 3 + 0.01 for _ in range(4)]
    live = {0, 1, 2}
    for _ in range(200_000):
        who = rng.choices(range(4), speed)[0]
        if who == 3 and program.on_the_way:
            where, at, what, barrier = program.on_the_way.pop(rng.randrange(len(program.on_the_way)))
            where[at] = what
            barrier.arrive()
        elif who in live and next(roles[who], "end") == "end":
            live.remove(who)
        if not live and not program.on_the_way:
            break
    assert not live, f"{sorted(live)} wait for ever"
    for log in program.done:
        assert [job for job, fast in log if fast] == list(range(len(program.jobs)))
        assert sorted(job for job, fast in log if not fast) == sorted({job for job, _ in program.wrong})


def draw(seed: int, careless: bool = False) -> tuple[Program, random.Random]:
    rng = random.Random(seed)
    jobs = [rng.choice([0, 1, 1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 9))]
    often = rng.choice([0.0, 0.3, 0.8])
    wrong = {(j, w) for j, tiles in enumerate(jobs) for w in (0, 1) if tiles and rng.random() < often}
    return Program(jobs, rng.choice([1, 2, 3, 3, 6]), wrong, careless), rng


def run_many(careless: bool = False) -> None:
    for seed in range(400):
        run(*draw(seed, careless))


def test_every_job_is_done_and_the_wrong_ones_again() -> None:
    run_many()


def test_the_model_sees_a_missing_wait() -> None:
    with pytest.raises(AssertionError):
        run_many(careless=True)
