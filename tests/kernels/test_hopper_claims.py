"""How programs of the Hopper kernels claim jobs without a kernel before them that sets the counter to 0, as a model.

The counter lies in memory that holds anything. Program 0 sets it to 0 and leaves a sign behind it, others do not claim
before they see the sign, and whose claim is the last takes it away: so the next launch may find the same memory. A change
of ``enter``, ``claim_next`` and ``claimed_of`` in ``hopper_load.py`` belongs here as well.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass

import pytest

SIGN = 0x8F1D3C5AE9B47260


@dataclass
class Memory:
    """What launches find: a counter and a sign."""

    counter: int
    sign: int


def program(
    number: int, programs: int, jobs: int, memory: Memory, done: list[int], careless: str
) -> Generator[None, None, None]:
    """One program; it yields between any two accesses to memory that others may see."""
    if number == 0:
        memory.counter = 0
        yield
        memory.sign = SIGN
        yield
    job, first = number, True
    while job < jobs:
        done.append(job)
        yield
        while first and memory.sign != SIGN:
            yield
        first = False
        claim, memory.counter = memory.counter, memory.counter + 1
        yield
        if claim == jobs - 1:
            memory.sign = 0
            yield
        job = programs + claim
    # Its first job is repeated: that claims nothing, and waits for nobody.
    while careless == "waits" and memory.sign != SIGN:
        yield
    if careless == "claims":
        claim, memory.counter = memory.counter, memory.counter + 1
        if claim == jobs - 1:
            memory.sign = 0


def launch(memory: Memory, programs: int, jobs: int, rng: random.Random, careless: str = "") -> None:
    """Until all programs have ended; raises if one waits for ever or a job is not done exactly once."""
    done: list[int] = []
    live = [program(number, programs, jobs, memory, done, careless) for number in range(programs)]
    speed = [rng.random() ** 3 + 0.01 for _ in live]
    for _ in range(500 * (jobs + programs)):
        if not live:
            break
        at = rng.choices(range(len(live)), speed)[0]
        if next(live[at], "end") == "end":
            del live[at], speed[at]
    assert not live, f"{len(live)} programs wait for ever"
    assert sorted(done) == list(range(jobs))
    assert memory.sign != SIGN
    assert memory.counter == jobs or careless == "claims"


def run_many(careless: str = "") -> None:
    rng = random.Random(5)
    for _ in range(150):
        memory = Memory(rng.choice([0, 7, -1]), rng.choice([0, -1, 7]))
        for _ in range(3):
            programs = rng.randint(1, 6)
            launch(memory, programs, rng.randint(programs, 4 * programs), rng, careless)


def test_launches_in_turn_share_memory() -> None:
    run_many()


@pytest.mark.parametrize("careless", ["claims", "waits"])
def test_the_model_sees_what_repeated_jobs_must_not_do(careless: str) -> None:
    with pytest.raises(AssertionError, match="wait for ever"):
        run_many(careless)
