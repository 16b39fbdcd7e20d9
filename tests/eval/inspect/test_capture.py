"""Captures: what is measured equals softmax computed by hand, memory is bounded, and nothing stays on the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel_eval.inspect import Capture, capture
from dit_accel_eval.inspect.model import look_bytes

# Spelled out, so that these tests do not change with the methods that ship.
CHOOSING = dit_accel.Method(
    name="choosing", order=("axes",), order_choice="recall", density=0.4, compensate="mean", warmup=0.2
)
PLAIN = dit_accel.Method(name="plain", density=0.4, warmup=0.2)
METHODS = [CHOOSING, PLAIN, "dense"]


@pytest.fixture(scope="module")
def taken(pipe: Any, call: dict[str, Any]) -> tuple[Capture, dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]]:
    """A capture, and the queries and keys of the last method's calls as `dit_accel::attend` got them."""
    from dit_accel.runtime import ModelRun

    seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    original = ModelRun.attend

    def spy(
        self: ModelRun, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        if self.method.name == "dense" and self._step.branch == "cond":
            seen[self._step.step, options["layer"]] = (query.clone(), key.clone())
        return original(self, query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRun, "attend", spy)
        found = capture(
            pipe, "a prompt", methods=METHODS, layers=[0, -1], steps=[0, 2, 4], heads=[1], tokens=20, **call
        )
    return found, seen


def _look(found: Capture, method: str, layer: int, step: int) -> Any:
    return next(x for x in found.looks if (x.method, x.layer, x.step) == (method, layer, step))


def _softmax(taken: Any, layer: int, step: int) -> torch.Tensor:
    q, k = (x[0, :, 1].double() for x in taken[1][step, layer])
    return (q @ k.T * q.shape[-1] ** -0.5).softmax(-1)


def test_everything_asked_for_is_there(taken: Any) -> None:
    found = taken[0]
    assert found.geometry.grid == (5, 8, 8)
    assert len(found.looks) == 3 * 2 * 3
    assert found.missing == ()
    assert found.frames == {}
    assert {x.dense for x in found.looks if x.method == "dense"} == {"method 'dense'"}
    assert _look(found, "choosing", 0, 4).dense is None
    assert _look(found, "choosing", 0, 0).dense is not None


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_and_maps_are_the_softmax(taken: Any, layer: int) -> None:
    found = taken[0]
    look, expected = _look(found, "dense", layer, 2), _softmax(taken, layer, 2)
    assert look.attention.shape == (1, len(found.tokens), 320)
    torch.testing.assert_close(look.attention[0].double(), expected[list(found.tokens)], atol=1e-5, rtol=2e-3)
    blocks = expected.view(5, 64, 5, 64).sum(-1).mean(1)
    torch.testing.assert_close(look.raster[0].double(), blocks, atol=1e-5, rtol=2e-3)
    assert look.ordered is None
    assert look.kept is None
    assert look.recall() is None


@pytest.mark.parametrize("method", ["choosing", "plain"])
def test_kept_blocks_visible_tokens_and_recall_agree(taken: Any, method: str) -> None:
    found = taken[0]
    look = _look(found, method, 1, 4)
    seen, kept = look.seen()[0], look.kept[0] != 0
    place = list(found.tokens) if look.place is None else look.place[0].tolist()
    for n, at in enumerate(place):
        assert seen[n].sum() == int(kept[at // look.block_q].sum()) * 64  # 320 tokens are 5 whole blocks
    assert look.density()[0] == pytest.approx(float(kept.float().mean()))
    ordered = look.raster if look.ordered is None else look.ordered
    assert look.recall()[0] == pytest.approx(float((ordered[0].float() * kept).sum(-1).mean()), rel=1e-4)


def test_reordered_maps_hold_the_same_mass_elsewhere(pipe: Any, call: dict[str, Any]) -> None:
    method = dit_accel.Method(name="moved", order=("hwf",), density=0.4, warmup=0.2)
    found = capture(pipe, "x", methods=[method], layers=[0], steps=[4], heads=[0, 1], tokens=list(range(320)), **call)
    look = found.looks[0]
    assert look.orders == ("hwf", "hwf")
    assert look.ordered is not None
    table = torch.arange(320).view(5, 64).T.reshape(-1)  # rows and columns outside, frames inside
    inverse = torch.empty_like(table).scatter_(0, table, torch.arange(320))
    assert torch.equal(look.place[0].long(), inverse)
    moved = look.attention[0].float()[table][:, table]
    torch.testing.assert_close(look.ordered[0].float(), moved.view(5, 64, 5, 64).sum(-1).mean(1), atol=1e-4, rtol=1e-2)
    levels = look.kept[0] != 0
    seen = torch.from_numpy(look.seen()[0])
    assert torch.equal(seen, levels[inverse // 64][:, inverse // 64])


def test_windows_are_seen_token_by_token(pipe: Any, call: dict[str, Any]) -> None:
    method = dit_accel.Method(name="near", score="window", window=(3, 3, 3), warmup=0.2)
    look = capture(pipe, "x", methods=[method], layers=[0], steps=[4], heads=[0], tokens=[0, 164], **call).looks[0]
    seen = torch.from_numpy(look.seen()[0]).view(2, 5, 8, 8)
    corner, middle = torch.zeros(5, 8, 8, dtype=torch.bool), torch.zeros(5, 8, 8, dtype=torch.bool)
    corner[:3, :3, :3] = True
    middle[1:4, 3:6, 3:6] = True  # token 164 is frame 2, row 4, column 4
    assert torch.equal(seen[0], corner)
    assert torch.equal(seen[1], middle)
    assert any("windows" in note for note in look.notes)
    mass = (look.attention[0].float() * seen.view(2, 320)).sum(-1).mean()
    assert look.recall()[0] == pytest.approx(float(mass), rel=1e-3)
    head = look.head_maps()[0]  # blocks that windows cut have a level of 255 and count once
    assert head.density == pytest.approx(float((look.kept != 0).float().mean()))
    assert 0 < head.raster_recall <= 1.001


def test_nothing_stays_behind_and_the_result_is_that_of_a_run_without_looking(pipe: Any, call: dict[str, Any]) -> None:
    def run() -> torch.Tensor:
        with dit_accel.enabled(pipe, PLAIN, min_tokens=0):
            out: torch.Tensor = pipe(generator=torch.Generator("cpu").manual_seed(3), **call).frames
            return out

    before = run()
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    found: list[torch.Tensor] = []

    class Kept:
        """A pipeline that remembers what it made."""

        transformer = pipe.transformer

        def __call__(self, **options: Any) -> Any:
            result = pipe(**options)
            found.append(result.frames)
            return result

    capture(Kept(), "x", methods=[PLAIN], seed=3, **call)
    assert torch.equal(found[0], before)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert not dit_accel.status(pipe)
    assert torch.equal(run(), before)


def test_the_bound_is_enforced_and_says_what_to_lower(pipe: Any, call: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "layers": [0, 1],
        "heads": [0, 1],
        "steps": [2, 4],
        "tokens": 16,
        "methods": [PLAIN],
        **call,
    }
    needed = 4 * look_bytes(2, 5, 5, 16, 320)
    found = capture(pipe, "x", max_bytes=needed, **asked)
    assert found.nbytes <= needed
    with pytest.raises(
        ValueError, match=r"1 methods x 2 layers x 2 steps x 2 heads, 16 sampled of 320 tokens. Name fewer"
    ):
        capture(pipe, "x", max_bytes=needed - 1, **asked)
    assert not dit_accel.status(pipe)


def test_what_cannot_be_seen_is_said(pipe: Any, call: dict[str, Any]) -> None:
    for wrong, told in (
        ({"layers": [2]}, "layers must be indices from -2 to 1"),
        ({"heads": [5]}, "heads must be indices from -2 to 1"),
        ({"steps": [5]}, "steps must be indices from -5 to 4"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"methods": []}, "methods must have names of their own"),
        ({"methods": ["auto", "auto"]}, "methods must have names of their own"),
        ({"methods": ["paro"]}, "method 'paro' is static"),
    ):
        with pytest.raises(ValueError, match=told):
            capture(pipe, "x", **wrong, **call)


def test_files_hold_all_of_it(taken: Any, tmp_path: Path) -> None:
    found = taken[0]
    folder = found.save(tmp_path / "new" / "capture")
    assert sorted(p.name for p in folder.iterdir()) == ["capture.json", "capture.safetensors"]
    again = Capture.load(folder)
    assert (again.prompt, again.seed, again.geometry, again.tokens, again.missing) == (
        found.prompt,
        found.seed,
        found.geometry,
        found.tokens,
        found.missing,
    )
    for a, b in zip(found.looks, again.looks, strict=True):
        assert a.to_dict() == b.to_dict()
        assert a.tensors().keys() == b.tensors().keys()
        assert all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())
    data = json.loads((folder / "capture.json").read_text())
    (folder / "capture.json").write_text(json.dumps({**data, "version": 9}))
    with pytest.raises(ValueError, match="must be of version 1, got 9"):
        Capture.load(folder)
    (folder / "capture.json").write_text(json.dumps({**data, "looks": data["looks"] * 2}))
    with pytest.raises(ValueError, match="do not belong together"):
        Capture.load(folder)
    (folder / "capture.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="it has no capture.safetensors"):
        Capture.load(folder)


def test_long_sequences_show_some_of_their_rows(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, call: dict[str, Any]
) -> None:
    monkeypatch.setattr("dit_accel_eval.inspect.measure.MOST_ROWS", 3)
    look = capture(pipe, "x", methods=[PLAIN], layers=[0], steps=[4], heads=[0], tokens=4, **call).looks[0]
    assert look.rows.tolist() == [0, 2, 4]
    assert look.raster.shape == (1, 3, 5)
    assert "the maps show 3 of 5 query blocks, evenly spread" in look.notes


# Methods that differ in what a plan holds: windows, content orders, gathered keys, pyramids, larger blocks.
UNLIKE = ("na", "svg2", "vertical_slash", "psa", "asa", "vmoba", "routing")


@pytest.mark.slow
@pytest.mark.parametrize("name", [m.name for m in dit_accel.methods() if m.name in UNLIKE])
def test_plans_of_every_kind_can_be_looked_at(pipe: Any, call: dict[str, Any], name: str) -> None:
    found = capture(pipe, "x", methods=[name], layers=[0], steps=[4], heads=[0, 1], tokens=6, **call)
    look = found.looks[0]
    assert look.dense is None
    assert look.kept is not None
    blocks = -(-320 // look.block_q)
    assert look.raster.shape == (2, blocks, -(-320 // look.block_k))
    torch.testing.assert_close(look.attention.float().sum(-1), torch.ones(2, 6), atol=2e-3, rtol=0)
    for maps in (look.raster, look.ordered):
        if maps is not None:
            torch.testing.assert_close(maps.float().sum(-1), torch.ones(2, blocks), atol=5e-3, rtol=0)
    assert all(0 <= share <= 1.001 for share in look.recall())
    assert all(0 <= one.raster_recall <= 1.001 and 0 < one.density <= 1 for one in look.head_maps())
