"""What ptxas makes of the Hopper kernel with gathered keys."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, _ in bodies:
        counts = counted(body, "HGMMA", "MUFU.EX2", "STL", "LDL", "LDGSTS.E.BYPASS.128", "LDGSTS") | {"length": len(body)}
        if body[0].startswith("BAR.SYNC") and counts["HGMMA"] and len(body) < 700:
            loops.append(counts)
        if counts["LDGSTS"] and not counts["HGMMA"] and len(body) < 600:
            loops.append(counts)
    print(json.dumps({"name": spec.name, "serialized": "C7515" in log, "loops": loops}))
"""


@pytest.mark.slow
def test_rows_are_copied_in_16_bytes_and_nothing_is_serialised() -> None:
    seen = compiled("dit_accel_kernels.pyramid.hopper", LOOK, "/d128/128x128/groups-of-16/bf16")
    assert len(seen) == 1
    (kernel,) = seen
    assert not kernel["serialized"], kernel
    copying = [loop for loop in kernel["loops"] if loop["LDGSTS"]]
    # Tiles with and without a bias: one of values and one of keys, 16 copies a thread each, with 24 registers.
    assert [loop["LDGSTS"] for loop in copying] == [32, 32], kernel
    assert [loop["LDGSTS.E.BYPASS.128"] for loop in copying] == [32, 32], kernel
    assert all(loop["STL"] == 0 and loop["LDL"] <= 4 for loop in copying), kernel
    # Two consumers with a fast and a careful loop each, for biased and for plain tiles.
    steps = [loop for loop in kernel["loops"] if loop["HGMMA"] == 16]
    assert len(steps) == 8, kernel
    assert all(loop["STL"] == loop["LDL"] == 0 for loop in steps), kernel
