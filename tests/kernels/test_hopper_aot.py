"""What ptxas makes of the Hopper kernel: exponentials run under a product everywhere, and nothing is spilled in a loop."""

from __future__ import annotations

import pytest

from tests.kernels.sass import compiled

pytest.importorskip("triton")

LOOK = r"""
    loops = []
    for body, waits in bodies:
        # One step: a wait for the logits and one for the product with the values. Waits for barriers that had to be
        # repeated jump into its middle.
        if len(waits) == 2 and body[0].startswith("BAR.SYNC"):
            between = sum("MUFU.EX2" in t for t in body[waits[0] : waits[1]])
            found = counted(body, "HGMMA", "MUFU.EX2", "FMNMX", "STL", "LDL")
            loops.append(found | {"length": len(body), "between": between})
    # Exponentials between each wait for logits and the next wait, which is for the product with the values.
    under, since = [], None
    for _, text in lines:
        if "DEPBAR.LE gsb0, 0x1" in text:
            since = 0
        elif "DEPBAR.LE gsb0, 0x0" in text and since is not None:
            under.append(since)
            since = None
        elif "MUFU.EX2" in text and since is not None:
            since += 1
    stores = sum("STL" in text for _, text in lines)
    seen = {"name": spec.name, "serialized": "C75" in log, "loops": loops, "under": under, "stores": stores}
    print(json.dumps(seen))
"""


@pytest.mark.slow
def test_loops_and_borders_overlap_and_spill_nothing() -> None:
    seen = compiled(
        "dit_accel_kernels.block_sparse.hopper",
        LOOK,
        "/plain/d128/128x128/bf16",
        "/plain/d64/128x128/bf16",
        "/ragged+pooled+order/d128/128x64/bf16",
        "/ragged+windows+order/d128/128x64/bf16",
    )
    assert len(seen) == 4
    for kernel in seen:
        assert not kernel["serialized"], kernel
        # A loop each, and the border of two jobs of either consumer.
        assert len(kernel["under"]) == len(kernel["loops"]) + 2, kernel
        assert min(kernel["under"]) >= 60, kernel
        if "windows" not in kernel["name"]:
            assert kernel["stores"] == 0, kernel
        plain = "/plain/" in kernel["name"]
        # Each of the two consumers: a fast and a careful loop, and the same again for biased tiles.
        assert len(kernel["loops"]) == (4 if plain else 8), kernel
        assert sum(loop["FMNMX"] == 0 for loop in kernel["loops"]) == len(kernel["loops"]) // 2, kernel
        for loop in kernel["loops"]:
            assert loop["STL"] == 0, kernel
            assert loop["LDL"] <= (3 if "windows" in kernel["name"] else 0), kernel
            # What windows hide takes two instructions a logit and some forty a tile.
            assert loop["length"] <= 720, kernel
            assert loop["HGMMA"] >= 12, kernel
            assert loop["between"] >= 60, kernel
