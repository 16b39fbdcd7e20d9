"""LPIPS and shift-tolerant LPIPS: architecture without weights, numbers against the original packages with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from dit_accel_eval import metrics
from dit_accel_eval.extractors import lpips

from .extracting import need

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def pictures() -> dict[str, np.ndarray]:
    """256 × 256 crops that the packages' own code was run on."""
    astronaut = data.astronaut()[:256, 128:384]
    noise = np.random.default_rng(0).normal(0, 25, astronaut.shape)
    return {
        "astronaut": astronaut,
        "noisy": np.clip(astronaut.astype(float) + noise, 0, 255).astype(np.uint8),
        "shifted": np.roll(astronaut, 1, 1),
        "other": data.coffee()[:256, 100:356],
    }


#: What stlpips-pytorch 0.0.2 printed for these pictures against the astronaut.
ST_LPIPS = {
    ("alex", "noisy"): 0.529598593711853,
    ("alex", "shifted"): 0.003992782905697823,
    ("alex", "other"): 0.7438778281211853,
    ("vgg", "noisy"): 0.642507791519165,
    ("vgg", "shifted"): 0.012466642074286938,
    ("vgg", "other"): 0.7931207418441772,
}


@pytest.mark.parametrize(("net", "picture"), list(ST_LPIPS))
def test_shift_tolerant_lpips_equals_its_package(net: str, picture: str) -> None:
    need(f"st-lpips-{net}")
    made = pictures()
    found = metrics.evaluate_pair(made[picture][None], made["astronaut"][None], [f"st_lpips_{net}"])
    assert found[f"st_lpips_{net}"] == pytest.approx(ST_LPIPS[net, picture], abs=2e-5)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_torchmetrics_with_the_same_weights(net: str) -> None:
    """torchmetrics brings the published heads; its trunk is filled with the pinned convolutions."""
    need(f"lpips-{net}")
    torchmetrics_lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    ours = lpips.load(f"lpips-{net}")
    theirs = heads_of_torchmetrics(torchmetrics_lpips, net)
    for index, head in enumerate(theirs):
        torch.testing.assert_close(ours.get_buffer(f"head{index}"), head, rtol=0, atol=1e-7)


def heads_of_torchmetrics(module, net: str) -> list[torch.Tensor]:
    from pathlib import Path

    path = Path(module.__file__).parent / "lpips_models" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(5)]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_recomputed_with_torch_modules(net: str) -> None:
    """The distance again from nn modules with the same weights, laid out as torchvision names its layers."""
    need(f"lpips-{net}")
    ours = lpips.load(f"lpips-{net}")
    convs = []
    while f"weight{len(convs)}" in dict(ours.named_buffers()):
        weight = ours.get_buffer(f"weight{len(convs)}")
        stride, padding = ((4, 2) if not convs else (1, 2 if len(convs) == 1 else 1)) if net == "alex" else (1, 1)
        conv = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding)
        conv.weight.data, conv.bias.data = weight, ours.get_buffer(f"bias{len(convs)}")
        convs.append(conv)
    made = pictures()
    x, y = (torch.from_numpy(made[k].copy()).permute(2, 0, 1)[None] / 127.5 - 1 for k in ("astronaut", "noisy"))
    shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
    pools = {"alex": {1: 3, 2: 3}, "vgg": {2: 2, 4: 2, 7: 2, 10: 2}}[net]
    taken = {"alex": (0, 1, 2, 3, 4), "vgg": (1, 3, 6, 9, 12)}[net]

    def features(z: torch.Tensor) -> list[torch.Tensor]:
        z = (z - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        out = []
        for index, conv in enumerate(convs):
            if index in pools:
                z = F.max_pool2d(z, pools[index], 2)
            z = conv(z).relu()
            if index in taken:
                out.append(F.normalize(z, dim=1))
        return out

    with torch.no_grad():
        want = sum(
            float(((p - q) ** 2 * ours.get_buffer(f"head{i}").view(1, -1, 1, 1)).sum(1).mean())
            for i, (p, q) in enumerate(zip(features(x), features(y)))
        )
    found = metrics.evaluate_pair(made["noisy"][None], made["astronaut"][None], [f"lpips_{net}"])
    assert found[f"lpips_{net}"] == pytest.approx(want, abs=1e-5)
    # Measured once; the trunk reproduced the published example distances 0.722 and 0.138 (docs/metrics.md).
    assert want == pytest.approx({"alex": 0.48025, "vgg": 0.48982}[net], abs=1e-4)


def test_conventions_of_the_projects_differ() -> None:
    need("lpips-alex", "lpips-vgg")
    made = pictures()
    clip, reference = made["noisy"][None], made["astronaut"][None]
    names = ["lpips_alex", "lpips_vgg", "lpips@svg", "lpips@teacache"]
    found = metrics.evaluate_pair(clip, reference, names)
    assert found["lpips@svg"] < found["lpips_vgg"] - 0.01  # [0, 1] instead of [-1, 1]
    assert found["lpips@teacache"] == pytest.approx(found["lpips_alex"], rel=0.05)  # only borders weigh differently
    assert found["lpips@teacache"] != found["lpips_alex"]
    net = lpips.load("lpips-vgg")
    planes = [torch.from_numpy(x.copy()).permute(0, 3, 1, 2) / 255 for x in (clip, reference)]
    with torch.inference_mode():
        assert found["lpips@svg"] == pytest.approx(float(net(*planes)), abs=1e-6)


@pytest.mark.parametrize("name", list(lpips.STAGES))
def test_distances_without_weights(name: str) -> None:
    """Random weights: zero for equal pictures, symmetric, a mean over pictures, blind to the size of activations."""
    generator = torch.Generator().manual_seed(0)
    net = random_net(name, generator)
    x, y = torch.rand(2, 2, 3, 70, 66, generator=generator) * 2 - 1
    with torch.inference_mode():
        assert float(net(x, x).abs().max()) == 0
        torch.testing.assert_close(net(x, y), net(y, x))
        torch.testing.assert_close(net(x, y)[:1], net(x[:1], y[:1]), rtol=1e-4, atol=1e-6)
        assert (net(x, y) > 0).all()
        assert [f.shape[1] for f in net.features(x)] == list(CHANNELS[name.rpartition("-")[2]])
        for feature in net.features(x):
            norms = feature.square().sum(1)
            assert float(norms.max()) <= 1 + 1e-4


def random_net(name: str, generator: torch.Generator) -> lpips.Lpips:
    wide = CHANNELS[name.rpartition("-")[2]]
    weights, biases, inputs, first = [], [], 3, True
    for outputs, stage in zip(wide, lpips.STAGES[name]):
        for kind, *_ in stage:
            if kind == "conv":
                side = (11 if first else 5 if inputs == 64 else 3) if name.endswith("alex") else 3
                weights.append(
                    torch.randn(outputs, inputs, side, side, generator=generator) / (inputs * side**2) ** 0.5
                )
                biases.append(torch.zeros(outputs))
                inputs, first = outputs, False
    return lpips.Lpips(lpips.STAGES[name], weights, biases, [torch.rand(c, generator=generator) for c in wide])


def test_blur_is_a_binomial_filter() -> None:
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 16
    blurred = lpips._blur(x)
    assert blurred.shape[2:] == (6, 6)
    assert float(blurred.sum()) == pytest.approx(4)  # every second of both axes
    constant = torch.full((1, 2, 8, 10), 3.0)
    torch.testing.assert_close(lpips._blur(constant), torch.full((1, 2, 5, 6), 3.0))
