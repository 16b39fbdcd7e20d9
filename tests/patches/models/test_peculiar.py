"""What single models need: masks that are not built, one call a sample, keys in front, lengths known at the call only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo.image import chroma
from model_zoo.video import NEW, lengths
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.method import Method

METHOD = Method(name="test", order="gilbert", score="mean_pool", density=0.5, block_q=16, block_k=16, warmup=0.0)
FLAT = METHOD.replace(order="raster")


class LargestMask(TorchDispatchMode):
    """Elements of the largest boolean tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bool and out.untyped_storage().nbytes() >= out.numel():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_hunyuan_video15_builds_no_square_mask(density: float, make: Any, forward: Any) -> None:
    """At 720p each of these masks of a layer would take 12 GB."""
    model, arguments = make("hunyuan_video15")
    tokens = 240 + 12 + 6 + 4
    with LargestMask() as before:
        expected = forward(model, arguments)
    assert before.elements == 2 * tokens * tokens
    with dit_accel.enable(model, METHOD.replace(density=density), min_tokens=0) as handle, LargestMask() as seen:
        forward(model, arguments)
    assert handle.stats()["transformer"].sparse_calls == 2
    # Masks of blocks, a few by head, are all that is left: less than a row of the old one for each query block.
    assert seen.elements <= 16 * tokens
    # Dense calls of an accelerated model build none either.
    with dit_accel.enable(model, "dense", min_tokens=0), LargestMask() as seen:
        dense = forward(model, arguments)
    assert seen.elements <= 16 * tokens
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)


#: Cases with padded prompts: the argument that holds the second prompt, and from where on it is padding.
PADDED = {
    "hunyuan_video": ("encoder_hidden_states", 5),
    "hunyuan_video15": ("encoder_hidden_states", 5),
    "mochi": ("encoder_hidden_states", None),
    "motif": ("encoder_hidden_states", 3),
    "qwenimage": ("encoder_hidden_states", 5),
    "nucleus": ("encoder_hidden_states", 5),
    "krea2": ("encoder_hidden_states", 5),
    "hunyuan_image": ("encoder_hidden_states", 5),
    "ernie": ("text_bth", 5),
    "prx": ("encoder_hidden_states", 5),
    "chroma_masked": ("encoder_hidden_states", 5),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_of_a_prompt_does_not_matter(name: str, make: Any, forward: Any) -> None:
    model, arguments = make(name)
    if name in ("prx", "qwenimage") and not NEW:
        pytest.skip("this version of diffusers does not mask the padding")
    argument, start = PADDED[name]
    sample = 0 if start is None else 1
    other = arguments[argument].clone()
    other[sample, 4 if start is None else start :] += 3.0
    with dit_accel.enable(model, METHOD, min_tokens=0):
        found = forward(model, arguments)[0][sample]
        changed = forward(model, {**arguments, argument: other})[0][sample]
    torch.testing.assert_close(found, changed, rtol=1e-4, atol=1e-5)


def test_mochi_samples_have_plans_of_their_own(make: Any, forward: Any) -> None:
    model, arguments = make("mochi")
    with dit_accel.enable(model, METHOD, min_tokens=0) as handle:
        both = forward(model, arguments)[0]
        status = handle.stats()["transformer"]
    assert (status.calls, status.sparse_calls, status.plans) == (4, 4, 4)
    assert status.geometry == "3x8x10 (+12 text behind)"
    for sample in (0, 1):
        one = {k: v[sample : sample + 1] for k, v in arguments.items()}
        one["hidden_states"] = arguments["hidden_states"][sample : sample + 1]
        with dit_accel.enable(model, METHOD.replace(density=1.0), min_tokens=0):
            alone = forward(model, one)[0]
        with dit_accel.enable(model, METHOD.replace(density=1.0), min_tokens=0):
            together = forward(model, arguments)[0]
        torch.testing.assert_close(together[sample], alone[0], rtol=1e-3, atol=2e-4)
    assert both.isfinite().all()


def test_mochi_plans_outlive_a_step(make: Any, forward: Any) -> None:
    model, arguments = make("mochi")
    with dit_accel.enable(model, METHOD, min_tokens=0) as handle:
        for timestep in (900, 600, 300):
            forward(model, {**arguments, "timestep": torch.tensor([timestep] * 2)})
        status = handle.stats()["transformer"]
    assert (status.calls, status.plans, status.cache_hits) == (12, 4, 8)


def test_framepack_counts_the_past_and_finds_the_text_at_the_call(make: Any, forward: Any) -> None:
    model, arguments = make("framepack")
    with dit_accel.enable(model, METHOD, min_tokens=0) as handle:
        forward(model, arguments)
        forward(model, {**arguments, "timestep": torch.tensor([500.0])})
        status = handle.stats()["transformer"]
    # Clean frames 2 x 80, older ones 1 x 20 and 1 x 6; 4 picture tokens and 7 valid text tokens of 12.
    assert status.geometry == "3x8x10 (+186 text, +11 behind)"
    assert (status.calls, status.plans) == (4, 2)


def test_helios_counts_the_past(make: Any, forward: Any) -> None:
    model, arguments = make("helios")
    with dit_accel.enable(model, METHOD, min_tokens=0) as handle:
        forward(model, arguments)
        assert handle.stats()["transformer"].geometry == "3x8x10 (+106 text)"


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("flux_kontext", "1x12x20 (+12 text, +35 behind)"),
        ("flux2", "1x12x20 (+12 text, +35 behind)"),
        ("flux3", "1x12x20 (+12 text, +35 behind)"),
        ("qwenimage_edit", "1x12x20 (+12 text, +35 behind)"),
        ("joyimage_plus", "1x12x20 (+47 text behind)"),
        ("minimax_h3", "3x8x10 (+34 text)"),
        ("hidream_oblong", "1x16x12 (+80 text behind)"),
        ("zimage_ragged", "1x12x20 (+80 text behind)"),
        ("wan_ti2v_5b", "3x8x10"),
        ("hunyuan_video_i2v", "3x8x10 (+12 text behind)"),
        ("prx", "1x12x20"),
        ("nucleus", "1x12x20"),
    ],
)
def test_references_and_text_around_the_picture(name: str, geometry: str, make: Any, forward: Any) -> None:
    model, arguments = make(name)
    with dit_accel.enable(model, METHOD, min_tokens=0) as handle:
        forward(model, arguments)
        assert handle.stats()["transformer"].geometry == geometry


def test_fused_projections_keep_rope_and_acceleration(make: Any, forward: Any) -> None:
    model, arguments = make("cogvideox")
    plain = forward(model, arguments)[0]
    assert not torch.allclose(plain, forward(model, {**arguments, "image_rotary_emb": None})[0])
    with dit_accel.enable(model, METHOD.replace(density=1.0), min_tokens=0) as handle:
        model.fuse_qkv_projections()
        fused = forward(model, arguments)[0]
        assert handle.stats()["transformer"].sparse_calls == 2
        model.unfuse_qkv_projections()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=2e-4)
    assert torch.equal(forward(model, arguments)[0], plain)


def test_cosmos_is_reached_and_left_alone_again(make: Any, forward: Any) -> None:
    from diffusers.models.transformers import transformer_cosmos

    # Before diffusers 0.37 Cosmos called F.scaled_dot_product_attention.
    names = vars(transformer_cosmos)
    before = {name: names[name] for name in ("F", "dispatch_attention_fn") if name in names}
    model, arguments = make("cosmos")
    other, _ = make("cosmos")
    expected = forward(other, arguments)[0]
    handle = dit_accel.enable(model, METHOD, min_tokens=0)
    assert not torch.equal(forward(model, arguments)[0], expected)
    assert torch.equal(forward(other, arguments)[0], expected)
    handle.disable()
    assert before
    assert all(names[name] is found for name, found in before.items())


@pytest.mark.parametrize("name", ["cosmos", "hunyuan_video15", "prx"])
def test_blocks_compile_to_whole_graphs(name: str, make: Any, forward: Any) -> None:
    model, arguments = make(name)
    blocks = model.blocks if name == "prx" else model.transformer_blocks
    with dit_accel.enable(model, METHOD, min_tokens=0):
        expected = forward(model, arguments)[0]
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(forward(model, arguments)[0], expected, rtol=1e-4, atol=1e-5)


def reasons(model: Any, arguments: dict[str, Any], forward: Any, method: Any = METHOD) -> str:
    """Why nothing was sparse; the output is that of the model alone."""
    expected = forward(model, arguments)[0]
    with dit_accel.enable(model, method, min_tokens=0) as handle:
        assert torch.equal(forward(model, arguments)[0], expected)
        status = handle.stats()["transformer"]
    assert status.sparse_calls == 0
    assert status.calls > 0
    return "; ".join(status.reasons)


def test_masks_that_add_to_the_scores_stay_dense(make: Any, forward: Any) -> None:
    """Chroma's pipeline and CogView4 hand numbers on where they mean a mask; the model is computed as it is."""
    mask = torch.cat([lengths(12, 12, 5).float(), torch.ones(2, 240)], dim=1)
    model, arguments = chroma(mask)
    assert "attention mask of shape (2, 1, 252, 252) and torch.float32" in reasons(model.eval(), arguments, forward)
    model, arguments = make("cogview4")
    arguments["attention_mask"] = lengths(12, 12, 5)
    assert "attention mask of shape (2, 1, 252, 252)" in reasons(model, arguments, forward)


def test_calls_that_no_grid_describes_stay_dense(make: Any, forward: Any) -> None:
    model, arguments = make("lumina2")
    arguments["encoder_attention_mask"] = lengths(12, 9, 4)
    assert "prompts of [9, 4] tokens in one batch" in reasons(model, arguments, forward)
    model, arguments = make("allegro")
    arguments["attention_mask"] = torch.ones(2, 3, 16, 20)
    assert "attention mask of shape" in reasons(model, arguments, forward)
    model, arguments = make("ltx")
    coordinates = torch.rand(2, 3, 240)
    arguments = {**arguments, "num_frames": None, "height": None, "width": None, "video_coords": coordinates}
    assert "needs a grid" in reasons(model, arguments, forward)


def test_ltx_with_coordinates_alone_has_one_axis(make: Any, forward: Any) -> None:
    model, arguments = make("ltx")
    arguments = {**arguments, "num_frames": None, "height": None, "width": None, "video_coords": torch.rand(2, 3, 240)}
    with dit_accel.enable(model, FLAT, min_tokens=0) as handle:
        forward(model, arguments)
        assert handle.stats()["transformer"].sparse_calls == 2


def test_kandinsky_with_sparse_attention_of_its_own() -> None:
    from dit_accel_patches.models.kandinsky import ADAPTER

    found = ADAPTER.geometry(torch.nn.Module(), (), {"sparse_params": {"to_fractal": True}})
    assert isinstance(found, str)
    assert "sparse attention of its own" in found


def test_ip_adapter_of_sd3_keeps_its_block_dense(make: Any, forward: Any) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model, arguments = make("sd3")
    model.transformer_blocks[0].attn.processor = SD3IPAdapterJointAttnProcessor2_0(
        hidden_size=128, ip_hidden_states_dim=16, head_dim=64, timesteps_emb_dim=128
    )
    extra = {"ip_hidden_states": torch.randn(2, 3, 16), "temb": torch.randn(2, 128)}
    expected = forward(model, {**arguments, "joint_attention_kwargs": extra})[0]
    with dit_accel.enable(model, METHOD.replace(density=1.0), min_tokens=0) as handle:
        found = forward(model, {**arguments, "joint_attention_kwargs": extra})[0]
        status = handle.stats()["transformer"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert status.sparse_calls == 1
    assert "SD3IPAdapterJointAttnProcessor2_0 is a module with weights" in "; ".join(status.reasons)


@pytest.mark.parametrize("head_dim", [64, 72, 88, 96, 112, 128, 256])
def test_head_sizes(head_dim: int, forward: Any) -> None:
    import diffusers

    options = {"sample_size": 32, "num_layers": 1, "in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
    model = diffusers.DiTTransformer2DModel(**options, attention_head_dim=head_dim).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    arguments = {
        "hidden_states": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor([900]),
        "class_labels": torch.tensor([3]),
    }
    expected = forward(model, arguments)[0]
    for density, close in ((1.0, True), (0.5, False)):
        with dit_accel.enable(model, METHOD.replace(density=density), min_tokens=0) as handle:
            found = forward(model, arguments)[0]
            assert handle.stats()["transformer"].sparse_calls == 1
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4) is close


@pytest.mark.parametrize(
    "name",
    ["wan", "ltx", "ltx2", "cosmos", "allegro", "latte", "kandinsky5", "helios", "anyflow", "pixart", "hunyuan_dit"],
)
def test_cross_attention_can_be_cached(name: str, make: Any, forward: Any, monkeypatch: Any) -> None:
    """Where the adapter names cross-attention, methods that override its output reach each block once."""
    model, arguments = make(name)
    expected = forward(model, arguments)[0]
    method = METHOD.replace(cross_attention="cached")
    with dit_accel.enable(model, method, min_tokens=0) as handle:
        run, seen = handle.runs["transformer"], []
        original = run.cross
        monkeypatch.setattr(run, "cross", lambda layer, output: seen.append(layer) or original(layer, output))
        forward(model, arguments)
    assert seen == list(range(len(run.layers)))
    assert torch.equal(forward(model, arguments)[0], expected)
