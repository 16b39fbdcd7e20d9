"""The Hopper kernel for short lists against the masked reference, on a GPU of compute capability 9.0.

The cases are those of ``test_hopper.py`` that it serves; each group runs in a process of its own under a time limit.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from dit_accel_kernels.block_sparse.hopper_short_specs import is_short
from dit_accel_kernels.block_sparse.hopper_specs import hopper_config
from dit_accel_kernels.lists import lists_from_levels
from tests.kernels.groups import run_in_a_process
from tests.kernels.test_hopper import GROUPS, IS_HOPPER, LONG, Case, run_case


def served(case: Case) -> bool:
    """Whether the kernel for short lists computes this case."""
    extras = case.pooled or case.order or case.valid or case.windows
    return not extras and case.dtype == torch.bfloat16 and case.fast is not False


SHORT_GROUPS = {name: [replace(c, short=1e9) for c in cases if served(c)] for name, cases in GROUPS.items()}
SHORT_GROUPS = {name: cases for name, cases in SHORT_GROUPS.items() if cases}
# Wild rows among others, so that some jobs of a program are repeated and others are not; and empty rows beside them.
_WILD = replace(LONG, wild=True, short=1e9)
SHORT_GROUPS["repeated jobs"] = [
    replace(_WILD, density=0.15),
    replace(_WILD, density=0.15, programs=1),
    replace(_WILD, density=0.15, programs=3, sk=1000, partial=True, block_k=64),
    replace(_WILD, density=0.05, programs=2, lse=False),
    replace(_WILD, density=0.3, dim=64, heads=30, list_shape=(1, 30)),
    replace(_WILD, density=0.1, sq=4000, programs=7),
]


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", SHORT_GROUPS)
def test_equals_the_reference(name: str) -> None:
    passed, said = run_in_a_process(__file__, "--group", name, limit=90.0)
    assert passed, said


def test_length_is_judged_by_what_the_host_knows() -> None:
    levels = torch.ones(1, 2, 3, 10, dtype=torch.uint8)
    config = replace(hopper_config(128), short_tiles=4.0)
    assert not is_short(lists_from_levels(levels, 128, 128), config)  # rows of up to ten tiles
    assert is_short(lists_from_levels(levels, 128, 128), replace(config, short_tiles=10.0))
    assert not is_short(lists_from_levels(levels, 128, 128), replace(config, short_tiles=9.9))
    assert is_short(lists_from_levels(levels, 128, 64), replace(config, short_tiles=5.0))  # ten blocks of half a tile
    assert is_short(lists_from_levels(levels, 128, 128, capacity=24), config)
    assert not is_short(lists_from_levels(levels, 128, 128, capacity=25), config)


def main(arguments: list[str]) -> int:
    torch.backends.cuda.matmul.allow_tf32 = False
    # Uninitialised memory is filled with NaN, so what the kernel does not write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for case in SHORT_GROUPS[arguments[1]]:
        sys.stdout.write(f"{case}\n")
        sys.stdout.flush()
        run_case(case)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
