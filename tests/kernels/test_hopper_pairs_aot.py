"""What ptxas makes of the Hopper kernel for pairs of query blocks: no loop spills, exponentials run under products."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One step: a wait for the logits and one for the product with the values.
        if len(waits) == 2 and 0 < sum("HGMMA" in t for t in body) <= 16 and len(body) < 600:
            found = counted(body, "HGMMA", "MUFU.EX2", "FMNMX", "STL", "LDL", "BAR.SYNC")
            between = sum("MUFU.EX2" in t for t in body[waits[0] : waits[1]])
            loops.append(found | {"length": len(body), "between": between})
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    print(json.dumps({"name": spec.name, "serialized": "C75" in log, "spilled": spilled, "loops": loops}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "keys", "length"), [(128, 64, 235), (64, 128, 370)])
def test_main_loops_overlap_and_spill_nothing(dim: int, keys: int, length: int) -> None:
    (kernel,) = compiled("dit_accel_kernels.block_sparse.hopper_pairs", LOOK, f"/plain/d{dim}/bf16")
    assert not kernel["serialized"], kernel
    assert kernel["spilled"] == 0, kernel
    fast = [loop for loop in kernel["loops"] if loop["FMNMX"] == 0]
    # Of each consumer: tiles that come alone, and those that both take.
    assert len(fast) == 4, kernel
    for loop in kernel["loops"]:
        assert loop["STL"] == loop["LDL"] == 0, kernel
        assert loop["between"] >= keys // 2 - 4, kernel
    for loop in fast:
        assert loop["length"] <= length, kernel
        assert loop["BAR.SYNC"] <= 4, kernel
