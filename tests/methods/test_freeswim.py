"""FreeSwim: the inward window, the dense turns, the logit scale and cross-attention kept from dense steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.cross import CrossCache
from dit_accel.geometry import TokenGeometry
from dit_accel.planner import Planner
from dit_accel.presets import get_method

diffusers = pytest.importorskip("diffusers")


def _transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    ).eval()


class _Model:
    """A pipeline of 4 steps over 3 x 8 x 12 tokens, to latents."""

    def __init__(self) -> None:
        self.transformer = _transformer()
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, transformer=self.transformer, vae=vae, scheduler=scheduler
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(2))

    def __call__(self) -> Tensor:
        self.pipe.transformer = self.transformer
        frames = self.pipe(
            prompt_embeds=self.text[0],
            negative_prompt_embeds=self.text[1],
            height=128,
            width=192,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        assert isinstance(frames, Tensor)
        return frames


@pytest.fixture
def model() -> _Model:
    return _Model()


def test_the_preset_has_the_numbers_of_the_paper() -> None:
    method = get_method("freeswim")
    assert method.score == "inward:31x53"
    assert method.logit_factor(171_360) == pytest.approx(math.sqrt(math.log(3120) / math.log(1560)))
    assert get_method("freeswim").replace(logit_scale="sqrt_log:1560").logit_factor(3120) == method.logit_factor(9)


def test_inward_window_equals_loops() -> None:
    geometry = TokenGeometry((2, 11, 14), prefix=5)
    method = get_method("freeswim").replace(score="inward:5x4", block_q=16, block_k=16)
    plan = Planner(method).pattern_plan(geometry, torch.device("cpu"), None, 2)
    assert plan.order is not None
    windows = plan.windows
    assert windows is not None
    order = plan.order.table[0].tolist()
    levels = plan.mask.levels()[0, 0]
    for row in range(0, geometry.tokens, 17):
        query = order[row] - 5
        for column in range(geometry.tokens):
            key = order[column] - 5
            if 0 <= query < geometry.visual and 0 <= key < geometry.visual:
                top = min(max(query // 14 % 11 - 2, 0), 11 - 5)
                left = min(max(query % 14 - 2, 0), 14 - 4)
                wanted = top <= key // 14 % 11 < top + 5 and left <= key % 14 < left + 4
            else:
                wanted = True
            code, lo, hi = windows.k_code[:, column], windows.q_lo[:, row], windows.q_hi[:, row]
            inside = bool(((lo <= code) & (code < hi)).all()) or bool(code[0] < 0)
            assert inside == wanted
            level = int(levels[row // 16, column // 16])
            assert level == 255 or (level == 1) == wanted


def test_cache_keeps_dense_outputs_by_layer_and_branch() -> None:
    cache = CrossCache("cached")
    dense = {(layer, branch): torch.randn(1, 3, 4) for layer in (0, 1) for branch in ("cond", "uncond")}
    for (layer, branch), output in dense.items():
        cache.note(layer, sparse=False)
        assert cache.override(layer, branch, output) is output
    cache.note(0, sparse=True)
    assert cache.override(0, "uncond", torch.zeros(1, 3, 4)).equal(dense[0, "uncond"])
    other = torch.zeros(2, 3, 4)
    assert cache.override(0, "cond", other) is other  # another batch
    assert cache.override(1, "cond", other) is other  # layer 1 was dense
    cache.note(1, sparse=True)
    assert cache.override(1, "cond", other + 1).equal(other)
    cache.clear()
    cache.note(0, sparse=True)
    assert cache.override(0, "cond", other) is other
    one = CrossCache("cached:cond")
    one.note(0, sparse=False)
    one.override(0, "uncond", dense[0, "uncond"])
    one.note(0, sparse=True)
    assert one.override(0, "uncond", other) is other


@pytest.mark.parametrize("value", ["kept", "cached:cond,uncond", "live:cond", "cached:branch=cond"])
def test_bad_values_raise(value: str) -> None:
    with pytest.raises(ValueError, match="cross_attention must be 'live', 'cached' or 'cached:BRANCH'"):
        get_method("freeswim").replace(cross_attention=value)


def _cross_outputs(model: _Model, block: int) -> list[Tensor]:
    """What the block gets from its cross-attention in each call: the hook stands behind ours."""
    seen: list[Tensor] = []
    hook = model.transformer.blocks[block].attn2.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    model()
    hook.remove()
    return seen


def test_outputs_of_dense_steps_override_those_of_window_steps(model: _Model) -> None:
    options = {"min_tokens": 0, "score": "inward:3x5", "cross_attention": "cached"}
    with dit_accel.enable(model.pipe, "freeswim", **options) as handle:
        for block in (0, 1):
            found = _cross_outputs(model, block)
            steps = [found[2 * i : 2 * i + 2] for i in range(4)]
            for sparse, dense in ((1, 0), (3, 2)):
                for branch in (0, 1):
                    assert torch.equal(steps[sparse][branch], steps[dense][branch])
            assert not torch.equal(steps[0][0], steps[2][0])
            assert not torch.equal(steps[0][0], steps[0][1])
        status = handle.stats()["transformer"]
        assert status.sparse_calls == 8
    with dit_accel.enable(model.pipe, "freeswim", **{**options, "cross_attention": "cached:cond"}):
        found = _cross_outputs(model, 1)
        assert torch.equal(found[2], found[0])
        assert not torch.equal(found[3], found[1])


def test_live_methods_hook_nothing_and_disable_restores_all(model: _Model) -> None:
    dense = model()
    hooks = {n: m._forward_hooks for n, m in model.transformer.named_modules()}
    attributes = {n: set(m.__dict__) for n, m in model.transformer.named_modules() if n}
    with dit_accel.enable(model.pipe, "na", min_tokens=0):
        assert not model.transformer.blocks[0].attn2._forward_hooks
    handle = dit_accel.enable(model.pipe, "freeswim", min_tokens=0, score="inward:3x5")
    own = model.transformer.blocks[0].attn2.register_forward_hook(lambda *_: None)
    assert len(model.transformer.blocks[0].attn2._forward_hooks) == 2
    assert not torch.equal(model(), dense)
    handle.disable()
    assert len(model.transformer.blocks[0].attn2._forward_hooks) == 1
    own.remove()
    assert all(m._forward_hooks is hooks[n] and not m._forward_hooks for n, m in model.transformer.named_modules())
    assert {n: set(m.__dict__) for n, m in model.transformer.named_modules() if n} == attributes
    assert torch.equal(model(), dense)


def test_a_copied_transformer_runs_dense_without_our_hooks(model: _Model) -> None:
    dense = model()
    with dit_accel.enable(model.pipe, "freeswim", min_tokens=0, score="inward:3x5"):
        copied = copy.deepcopy(model.transformer)
        original, model.transformer = model.transformer, copied
        assert torch.equal(model(), dense)
        assert not any(m._forward_hooks for m in copied.modules())
        model.transformer = original


def test_full_window_without_scale_or_cache_is_dense(model: _Model) -> None:
    dense = model()
    options = {"min_tokens": 0, "logit_scale": "none", "cross_attention": "live"}
    with dit_accel.enable(model.pipe, "freeswim", **options) as handle:
        torch.testing.assert_close(model(), dense, atol=1e-5, rtol=1e-5)
        assert handle.stats()["transformer"].density == 1.0  # 31x53 is more than this grid has


def test_compiled_blocks_share_one_graph(model: _Model) -> None:
    options = {"min_tokens": 0, "score": "inward:3x5"}
    with dit_accel.enable(model.pipe, "freeswim", **options):
        eager = model()
        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for block in model.transformer.blocks:
            block.compile(backend=backend, fullgraph=True)
        torch.testing.assert_close(model(), eager, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert len(graphs) == 1
