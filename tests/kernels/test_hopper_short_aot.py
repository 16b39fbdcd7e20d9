"""What ptxas makes of the Hopper kernel for short lists: hardly anything is spilled, main loops overlap."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One step: a wait for the logits and one for the product with the values. Of the loops that hold this one, the
        # first step of which is peeled off, and of waits that had to be repeated, none has two waits and one product each.
        if len(waits) == 2 and sum("HGMMA" in t for t in body) <= 16 and len(body) < 600:
            between = sum("MUFU.EX2" in t for t in body[waits[0] : waits[1]])
            found = counted(body, "HGMMA", "MUFU.EX2", "FMNMX", "STL", "LDL")
            loops.append(found | {"length": len(body), "between": between})
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    print(json.dumps({"name": spec.name, "serialized": "C75" in log, "spilled": spilled, "loops": loops}))
"""


@pytest.mark.slow
def test_main_loops_overlap_and_spill_nothing() -> None:
    seen = compiled(
        "dit_accel_kernels.block_sparse.hopper_short",
        LOOK,
        "/plain/d128/128x128/bf16",
        "/plain/d64/128x128/bf16",
        "/ragged/d128/128x64/bf16",
    )
    assert len(seen) == 3
    for kernel in seen:
        assert not kernel["serialized"], kernel
        assert kernel["spilled"] <= (8 if "ragged" in kernel["name"] else 0), kernel
        # Each of the two consumers: a loop without a maximum and one, for repeated jobs, that takes it.
        fast = [loop for loop in kernel["loops"] if loop["FMNMX"] == 0]
        assert len(fast) == 2, kernel
        assert len(kernel["loops"]) == 4, kernel
        for loop in kernel["loops"]:
            assert loop["STL"] == loop["LDL"] == 0, kernel
            assert loop["length"] <= 520, kernel
            assert loop["HGMMA"] >= 12, kernel
            assert loop["between"] >= 60, kernel
        assert all(loop["length"] <= 360 for loop in fast), kernel
