from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from dit_accel.geometry import TokenGeometry
from dit_accel_patches import flux as flux_module
from dit_accel_patches.flux import ADAPTER as FLUX
from dit_accel_patches.install import install
from dit_accel_patches.wan import ADAPTER as WAN


def ids(height, width, image=0, row=0, dtype=torch.float32):
    table = torch.zeros(height, width, 3)
    table[..., 0] = image
    table[..., 1] = row + torch.arange(height)[:, None]
    table[..., 2] = torch.arange(width)[None]
    return table.view(-1, 3).to(dtype)


def flux_geometry(img_ids, text=5):
    kwargs = {"img_ids": img_ids, "encoder_hidden_states": torch.zeros(1, text, 8)}
    return FLUX.geometry(diffusers.FluxTransformer2DModel, (), kwargs)


@pytest.mark.parametrize("adapter", [WAN, FLUX], ids=lambda a: a.name)
def test_every_model_of_an_adapter_exists_and_has_its_blocks(adapter):
    import inspect

    for name in adapter.models:
        source = inspect.getsource(getattr(diffusers, name))
        assert any(f"self.{blocks} = nn.ModuleList(" in source for blocks in adapter.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (1, 7), (300, 2), (3, 300)])
def test_flux_text_to_image(height, width, dtype):
    found = flux_geometry(ids(height, width, dtype=dtype))
    assert found == TokenGeometry(grid=(1, height, width), prefix=5)


def test_flux_kontext_reference_is_behind_the_image():
    found = flux_geometry(torch.cat([ids(4, 6), ids(3, 5, image=1)]))
    assert found == TokenGeometry(grid=(1, 4, 6), prefix=5, suffix=15)


def test_flux_ids_may_have_a_batch_and_an_offset():
    assert flux_geometry(ids(4, 6, row=9)[None]) == TokenGeometry(grid=(1, 4, 6), prefix=5)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (ids(4, 6)[:-1], "do not fill rows"),
        (ids(4, 6)[torch.randperm(24)], "rows of|raster order"),
        (torch.cat([ids(2, 6), ids(2, 6).flip(0)]), "raster order"),
        (torch.zeros(0, 3), r"must be \[S, 3\]"),
        (torch.zeros(4, 2), r"must be \[S, 3\]"),
        (None, "must be tensors"),
    ],
    ids=["ragged", "shuffled", "flipped", "empty", "two-ids", "missing"],
)
def test_flux_says_why_there_is_no_grid(table, reason):
    found = flux_geometry(table)
    assert isinstance(found, str)
    import re

    assert re.search(reason, found)


def test_flux_reads_the_ids_once_a_run(flux, make_run, monkeypatch):
    read = []
    real = flux_module._read_grid
    monkeypatch.setattr(flux_module, "_read_grid", lambda table: read.append(1) or real(table))
    run = make_run()
    install(flux.model, FLUX, run)
    flux()
    flux()
    assert len(read) == 2
    assert {g for g, _ in run.forwards} == {TokenGeometry(grid=(1, 4, 6), prefix=16)}


def test_flux_geometry_is_the_length_of_the_sequence(flux, make_run):
    run = make_run()
    install(flux.model, FLUX, run)
    flux()
    assert {call.shape[1] for call in run.calls} == {run.forwards[0][0].tokens}


@pytest.mark.parametrize("positional", [False, True])
def test_wan_grid_is_counted_in_patches(make_wan, positional):
    latent = torch.zeros(1, 16, 3, 4, 6)
    args, kwargs = ((latent,), {}) if positional else ((), {"hidden_states": latent})
    assert WAN.geometry(make_wan(), args, kwargs) == TokenGeometry(grid=(3, 2, 3))


def test_wan_says_what_it_expected():
    model = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2)))
    found = WAN.geometry(model, (), {"hidden_states": torch.zeros(1, 5, 8)})
    assert found == "hidden_states must be [B, C, F, H, W], got (1, 5, 8)"


def test_wan_geometry_is_the_length_of_the_sequence(wan, make_run):
    run = make_run()
    install(wan.model, WAN, run)
    wan()
    assert {call.shape[1] for call in run.calls} == {run.forwards[0][0].tokens}


def small(**more):
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 3,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
        **more,
    }


def test_vace_layers_come_behind_the_blocks(make_run, wan_inputs):
    model = diffusers.WanVACETransformer3DModel(**small(vace_layers=[0, 2], vace_in_channels=16)).eval()
    run = make_run()
    inputs = {**wan_inputs, "control_hidden_states": torch.randn(1, 16, 3, 4, 6)}
    with torch.no_grad():
        expected = model(**inputs).sample
        installation = install(model, WAN, run)
        assert torch.equal(model(**inputs).sample, expected)
    assert installation.layers[3:] == ("vace_blocks.0.attn1", "vace_blocks.1.attn1")
    assert sorted(run.layers) == [0, 1, 2, 3, 4]
    assert {call.shape[1] for call in run.calls} == {18}


@pytest.mark.parametrize("frames_per_block", [1, 3])
def test_skyreels_causal_mask_stays_dense_with_a_reason(make_run, wan_inputs, frames_per_block):
    model = diffusers.SkyReelsV2Transformer3DModel(**small(num_frame_per_block=frames_per_block)).eval()
    run = make_run()
    with torch.no_grad():
        expected = model(**wan_inputs).sample
        install(model, WAN, run)
        assert torch.equal(model(**wan_inputs).sample, expected)
    if frames_per_block == 1:
        assert run.layers == [0, 1, 2]
    else:
        assert not run.calls
        assert "attention mask of shape (1, 1, 18, 18)" in run.declined[0][1]


def test_chronoedit(make_run, wan_inputs):
    model = diffusers.ChronoEditTransformer3DModel(**small()).eval()
    run = make_run()
    with torch.no_grad():
        expected = model(**wan_inputs).sample
        install(model, WAN, run)
        assert torch.equal(model(**wan_inputs).sample, expected)
    assert run.layers == [0, 1, 2]
