"""Trained scorers: what they see, the gate and its file, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import make_run, one_step
from problems import HUNYUAN, context, make_plan, qkv
from safetensors.torch import save_file
from torch import Tensor

from dit_accel import learned
from dit_accel.gate import Gate, GateInfo
from dit_accel.learned import BlockFeatures, missing_scorer, pool, register_scorer
from dit_accel.method import Method
from dit_accel.score import block_scores

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "examples/tiny_wan_gate.safetensors"


@pytest.fixture(autouse=True)
def scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_scorers", dict(learned._scorers))


def _info(**changes: Any) -> GateInfo:
    fields: dict[str, Any] = {"model": "", "layers": ("blocks.0.attn", "blocks.1.attn"), "heads": 2, "head_dim": 32}
    return GateInfo(**{**fields, **changes})


def _gate(seed: int | None = 0, **changes: Any) -> Gate:
    info = _info(**changes)
    gen = torch.Generator().manual_seed(seed or 0)
    lead = (len(info.layers), info.heads)
    query = torch.randn(*lead, len(info.query_pools) * info.head_dim, 8, generator=gen) * 0.05
    key = torch.randn(*lead, len(info.key_pools) * info.head_dim, 8, generator=gen) * 0.05
    return Gate(info, query, key * 0 if seed is None else key)


@pytest.mark.parametrize("masked", [False, True])
def test_pools_equal_loops(masked: bool) -> None:
    x = torch.randn(2, 2, 150, 5)
    valid = torch.rand(2, 150) < 0.7 if masked else torch.ones(2, 150, dtype=torch.bool)
    valid[:, 64:128] = not masked
    found = pool(x, 64, ("min", "mean", "max"), valid if masked else None)
    for b in range(2):
        for h in range(2):
            for i in range(3):
                rows = x[b, h, i * 64 : i * 64 + 64][valid[b, i * 64 : i * 64 + 64]]
                expected = torch.zeros(15) if len(rows) == 0 else torch.cat([rows.amin(0), rows.mean(0), rows.amax(0)])
                torch.testing.assert_close(found[b, h, i], expected)
    with pytest.raises(ValueError, match=r"pools must be among mean, max, min, got \['median'\]"):
        pool(x, 64, ("median",))


def _scores(name: str, scorer: Any, key_valid: Tensor | None = None, layer: int = 0, **changes: Any) -> Tensor:
    register_scorer(name, scorer, replace=True)
    _, ctx = context("sol", HUNYUAN, qkv(HUNYUAN, 1), key_valid=key_valid, score=f"learned:{name}", **changes)
    ctx.layer = layer
    return block_scores(ctx).values


def test_an_untrained_gate_is_mean_pooling() -> None:
    found = _scores("fresh", _gate(None))
    _, ctx = context("sol", HUNYUAN, qkv(HUNYUAN, 1), score="mean_pool")
    torch.testing.assert_close(found, block_scores(ctx).values, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("base", ["mean_pool", "none"])
def test_a_gate_follows_its_formula(base: str) -> None:
    gate = _gate(3, base=base, query_pools=("mean", "max"))
    valid = torch.ones(1, HUNYUAN.tokens, dtype=torch.bool)
    valid[:, -37:] = False
    found = _scores("mine", gate, valid, layer=1)
    q, k, _ = qkv(HUNYUAN, 1)
    x, y = pool(q, 64, ("mean", "max")), pool(k, 64, ("mean", "max", "min"), valid)
    counts = valid[0].float().split(64)
    for h in range(2):
        for i in range(found.shape[2]):
            logits = []
            for j, count in enumerate(counts):
                value = (x[0, h, i] @ gate.query[1, h]) @ (y[0, h, j] @ gate.key[1, h])
                if base == "mean_pool":
                    value = value + (x[0, h, i, :32] @ y[0, h, j, :32]) * 32**-0.5
                logits.append(value + count.sum().log())
            torch.testing.assert_close(found[0, h, i], torch.stack(logits).softmax(0), atol=1e-6, rtol=1e-4)


def test_blocks_without_a_valid_key_get_nothing() -> None:
    valid = torch.ones(1, HUNYUAN.tokens, dtype=torch.bool)
    valid[:, 64:128] = False
    found = _scores("mine", _gate(), valid)
    assert (found[..., 1] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_the_file_gives_the_gate_back(tmp_path: Path) -> None:
    gate = _gate(5, note="a test", order=("gilbert",))
    gate.save(tmp_path / "gate.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["gate.safetensors"]
    again = Gate.load(tmp_path / "gate.safetensors")
    assert again.info == gate.info
    assert torch.equal(again.query, gate.query)
    assert torch.equal(again.key, gate.key)
    loaded = register_scorer("from_file", tmp_path / "gate.safetensors")
    assert isinstance(loaded, Gate)


def _damage(path: Path, what: str) -> None:
    gate = _gate()
    meta = {"format": "dit_accel.gate", "version": 1, **json.loads(json.dumps(gate.info.__dict__))}
    tensors = {"query": gate.query, "key": gate.key}
    if what == "noise":
        path.write_bytes(b"not a file of tensors")
        return
    if what == "version":
        meta["version"] = 9
    elif what == "unknown":
        meta["colour"] = "blue"
    elif what == "pools":
        meta["key_pools"] = ["median"]
    elif what == "tensor":
        del tensors["key"]
    elif what == "shape":
        tensors["key"] = tensors["key"][:, :1].contiguous()
    elif what == "nan":
        tensors["query"] = tensors["query"].clone().fill_(torch.nan)
    elif what == "missing":
        del meta["heads"]
    save_file(tensors, path, {} if what == "other" else {"gate": json.dumps(meta)})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("noise", "is not a readable gate"),
        ("other", "this is not a gate of dit_accel"),
        ("version", "has version 9, this dit_accel reads up to 1"),
        ("unknown", r"unknown metadata \['colour'\]"),
        ("pools", r"pools of a gate must be among mean, max, min, got \['median'\]"),
        ("tensor", "has no tensor 'key'"),
        ("shape", r"key weights of a gate must be \[2, 2, 96, W\], got \[2, 1, 96, 8\]"),
        ("nan", "query weights of the gate are not finite"),
        ("missing", "heads"),
    ],
)
def test_damaged_files(tmp_path: Path, what: str, words: str) -> None:
    path = tmp_path / "gate.safetensors"
    _damage(path, what)
    with pytest.raises(ValueError, match=words):
        Gate.load(path)


def test_a_gate_of_another_setting() -> None:
    register_scorer("mine", _gate())
    make_run("sol", 2, score="learned:mine")
    for changes, layers, words in (
        ({}, 3, "the layers"),
        ({"block_k": 32}, 2, r"blocks \(64, 64\), now \(64, 32\)"),
        ({"order": "gilbert"}, 2, r"the order \('raster',\), now \('gilbert',\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make_run("sol", layers, score="learned:mine", **changes)


def test_a_scorer_that_is_not_there() -> None:
    words = r"score 'learned:nobody' needs a trained scorer: call dit_accel.register_scorer\('nobody'"
    with pytest.raises(ValueError, match=words):
        make_run("sol", 2, score="learned:nobody")
    assert missing_scorer(Method(name="x", score="learned:nobody")) == "nobody"
    assert missing_scorer(Method(name="x", score="mean_pool")) is None
    with pytest.raises(ValueError, match="score 'learned' takes"):
        Method(name="x", score="learned")


def test_bad_registrations(tmp_path: Path) -> None:
    register_scorer("mine", _gate())
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_scorer("mine", _gate())
    with pytest.raises(ValueError, match="name of a scorer must be letters"):
        register_scorer("a:b", _gate())
    with pytest.raises(TypeError, match="must be a callable or a file, got int"):
        register_scorer("number", 3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no gate at"):
        register_scorer("gone", tmp_path / "gone.safetensors")


@pytest.mark.parametrize("bad", ["shape", "dtype"])
def test_a_scorer_that_gives_the_wrong_thing(bad: str) -> None:
    def scorer(features: BlockFeatures) -> Tensor:
        logits = features.query() @ features.key().mT
        return logits[:, :1] if bad == "shape" else logits.half()

    with pytest.raises(ValueError, match=r"scorer 'wrong' must give float32 \[1, 2, 9, 9\]"):
        _scores("wrong", scorer)


def test_any_callable_plans_and_runs() -> None:
    """One that looks at the neighbours of a block only."""

    def near(features: BlockFeatures) -> Tensor:
        q, k = features.query(), features.key()
        rows, cols = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return -(rows - cols).abs().float().expand(*q.shape[:2], -1, -1)

    register_scorer("near", near)
    plan = make_plan("sol", HUNYUAN, qkv(HUNYUAN), score="learned:near", select="top_k", density=0.3)
    # 30 % of nine blocks are three: the last two hold text, and the nearest comes third
    assert plan.mask.levels()[0, 0, 4].tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1]
    run = make_run("sol", 2, score="learned:near", select="top_k", density=0.4, warmup=0.0)
    one_step(run, 0, 2)
    assert run.status().sparse_calls == 2


def test_the_committed_gate_fits_tiny_wan() -> None:
    assert COMMITTED.stat().st_size < 1_000_000
    gate = Gate.load(COMMITTED)
    config = json.loads((ROOT / "examples/tiny_wan/transformer/config.json").read_text())
    assert gate.info.model == config["_class_name"]
    assert gate.info.heads == config["num_attention_heads"]
    assert gate.info.head_dim == config["attention_head_dim"]
    assert gate.info.layers == tuple(f"blocks.{i}.attn1" for i in range(config["num_layers"]))


@pytest.mark.slow
def test_the_committed_gate_runs_on_tiny_wan() -> None:
    pytest.importorskip("diffusers")
    import dit_accel
    from dit_accel.demo.pipeline import load

    pipe = load(ROOT / "examples/tiny_wan", torch.device("cpu"))
    register_scorer("seer", COMMITTED, replace=True)
    with dit_accel.enabled(pipe, "seer", density=0.3, min_tokens=0) as handle:
        pipe("octopus", height=64, width=64, num_frames=9, num_inference_steps=3, output_type="latent")
        (status,) = handle.stats().values()
    assert status.sparse_calls > 0
    assert status.plans == status.sparse_calls  # every:1
