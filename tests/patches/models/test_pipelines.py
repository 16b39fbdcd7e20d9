"""A pipeline of each family: scheduler, guidance and text as users have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from model_zoo.pipelines import PIPELINES, TWO_STEPS

import dit_accel
from dit_accel.method import Method

METHOD = Method(name="test", order="gilbert", score="mean_pool", density=0.5, block_q=16, block_k=16, warmup=0.0)
#: Pipelines that run both branches of guidance in one batch.
BATCHED = ("cogvideox", "ltx", "mochi", "sd3", "dit")


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str, make: Any) -> None:
    torch.manual_seed(0)
    pipe, call = PIPELINES[name](make(name)[0])
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        out = pipe(**{**TWO_STEPS, **call}, generator=torch.Generator().manual_seed(0))[0]
        return torch.as_tensor(np.asarray(out)) if not isinstance(out, torch.Tensor) else out

    expected = run()
    with dit_accel.enable(pipe, METHOD.replace(density=1.0), min_tokens=0) as handle:
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
        assert not handle.stats()["transformer"].reasons
    with dit_accel.enable(pipe, METHOD, min_tokens=0) as handle:
        sparse = run()
        status = handle.stats()["transformer"]
    assert status.sparse_calls == status.calls > 0
    assert status.sparse_density < 0.95  # hunyuan_video15 has more tokens beside the video than in it
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, expected)
    assert torch.equal(run(), expected)


def test_chroma_hands_numbers_on_and_stays_dense(make: Any) -> None:
    from model_zoo.pipelines import chroma

    pipe, call = chroma(make("chroma")[0])
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.enable(pipe, METHOD, min_tokens=0) as handle:
        pipe(**{**TWO_STEPS, **call})
        status = handle.stats()["transformer"]
    assert status.sparse_calls == 0
    assert "attention mask of shape (1, 1, 252, 252) and torch.float32" in "; ".join(status.reasons)
