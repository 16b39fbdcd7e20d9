"""What ptxas makes of the 8-bit Hopper kernel: the loops spill nothing and run their exponentials under products."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One step. Waits for barriers that had to be repeated jump into its middle; a job has more of them than a step.
        barriers = sum("SYNCS" in t for t in body)
        if len(waits) == 2 and body[0].startswith("BAR.SYNC") and barriers < 8:
            turns = [j for j, t in enumerate(body) if "BAR.ARV" in t] or [0]
            counts = counted(body, "GMMA", "VOTE", "STL", "LDL", "BAR.ARV")
            counts["between"] = sum("MUFU.EX2" in t for t in body[waits[0] : waits[-1]])
            counts["before the turn"] = sum("MUFU.EX2" in t for t in body[: turns[0]])
            loops.append(counts)
    print(json.dumps({"name": spec.name, "serialized": re.findall(r"C75\d\d", log), "loops": loops}))
"""


@pytest.mark.slow
def test_main_loops_overlap_and_spill_nothing() -> None:
    seen = compiled(
        "dit_accel_kernels.quantized.hopper8",
        LOOK,
        *(f"/plain/{kinds}/d128/128x128/bf16" for kinds in ("int8/bf16", "int8/fp8", "fp8/fp8")),
    )
    assert len(seen) == 3
    for kernel in seen:
        assert not kernel["serialized"], kernel
        assert len(kernel["loops"]) >= 2, kernel  # one for each consumer
        for loop in kernel["loops"]:
            assert loop["STL"] == loop["LDL"] == 0, kernel
            assert loop["VOTE"] == 1, kernel
            if "/int8/bf16/" in kernel["name"]:
                # Exponentials run under the product with the values of the tile before.
                assert loop["GMMA"] == 12, kernel
                assert loop["between"] >= 60, kernel
            else:
                # They run under the products of the other consumer, which has its turn before them.
                assert loop["GMMA"] == 8, kernel
                assert loop["BAR.ARV"] == 1, kernel
                assert loop["before the turn"] <= 2, kernel
