"""What ptxas makes of the Hopper kernel of the block mass: nothing is spilled, and exponentials are what they should be."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One tile: one wait for its product. Waits for barriers that had to be repeated jump into its middle.
        if len(waits) == 1 and body[0].startswith("BAR.SYNC") and len(body) < 700:
            found = counted(body, "HGMMA", "MUFU.EX2", "FFMA.FTZ.SAT", "STL", "LDL", "LDS")
            loops.append(found | {"length": len(body)})
    registers = re.findall(r"Used (\d+) registers", log)
    seen = {"name": spec.name, "serialized": "C75" in log, "loops": loops, "registers": registers}
    print(json.dumps(seen))
"""


@pytest.mark.slow
def test_loops_are_short_and_a_quarter_of_the_exponentials_are_polynomials() -> None:
    seen = compiled("dit_accel_kernels.block_mass.hopper", LOOK, "/128x64/ragged/d64/bf16", "/128x128/d128/bf16")
    assert len(seen) == 2
    for kernel in seen:
        assert not kernel["serialized"], kernel
        small = "/d64/" in kernel["name"]
        assert len(kernel["loops"]) == 4, kernel  # one of each consumer; the last tile of a job stands behind it
        for loop in kernel["loops"]:
            assert loop["STL"] == loop["LDL"] == 0, kernel
            assert loop["HGMMA"] == (4 if small else 8), kernel
            assert loop["MUFU.EX2"] == (48 if small else 64), kernel
            assert loop["FFMA.FTZ.SAT"] == (16 if small else 0), kernel
            assert loop["LDS"] == 0, kernel
            assert loop["length"] <= (360 if small else 260), kernel
