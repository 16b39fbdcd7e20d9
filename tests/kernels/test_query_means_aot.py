"""What ptxas makes of the mean-query kernel for Hopper: loops spill nothing, exponentials run under the products."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One tile: three products, of queries and keys and of two sorts of weights with values.
        if sum("HGMMA" in t for t in body) in (12, 16) and not any("STG" in t for t in body):
            between = sum("MUFU.EX2" in t for t in body[waits[0] : waits[-1]])
            found = counted(body, "MUFU.EX2", "FMNMX", "STL", "LDL")
            loops.append(found | {"waits": len(waits), "between": between})
    serialized = any(code in log for code in ("C7510", "C7512", "C7514", "C7515", "C7518"))
    print(json.dumps({"name": spec.name, "serialized": serialized, "loops": loops}))
"""


@pytest.mark.slow
def test_main_loops_overlap_and_spill_nothing() -> None:
    names = ("/fast/d128/k64/bf16", "/retry/d128/k64/bf16", "/fast/d64/k64/bf16")
    seen = compiled("dit_accel_kernels.query_means.hopper", LOOK, *names)
    assert len(seen) == 3
    for kernel, consumers in zip(seen, (2, 2, 3), strict=True):
        assert not kernel["serialized"], kernel
        assert len(kernel["loops"]) == consumers, kernel
        for loop in kernel["loops"]:
            assert loop["STL"] == loop["LDL"] == 0, kernel
            assert (loop["FMNMX"] == 0) == ("/fast/" in kernel["name"]), kernel
            if "/fast/d128" in kernel["name"]:  # the others wait once, and another consumer fills the gap
                assert loop["waits"] == 2, kernel
                assert loop["between"] == 32, kernel
