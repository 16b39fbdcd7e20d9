"""Distances of sets of clips: closed forms, other ways to compute them, and what the results carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_accel_eval.metrics import distribution, drift, feature_nets
from dit_accel_eval.metrics.feature_nets import Extractor

from .extracting import need


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """Samples whose mean and covariance are exactly those asked for."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def closed_form(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray) -> float:
    """Fréchet distance of two Gaussians: the root of the product by its eigenvalues."""
    roots = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0)).sum()
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots)


def test_fid_of_two_gaussians() -> None:
    rng = np.random.default_rng(3)
    m1, m2 = rng.normal(size=(2, 6))
    a, b = rng.normal(size=(2, 6, 6))
    c1, c2 = a @ a.T + np.eye(6), b @ b.T + np.eye(6)
    x, y = gaussian(m1, c1, 200, 1), gaussian(m2, c2, 300, 2)
    want = closed_form(m1, c1, m2, c2)
    assert distribution.fid(x, y) == pytest.approx(want, rel=1e-4)
    assert distribution.frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert distribution.fid(x, x) == pytest.approx(0, abs=1e-3)


def test_fid_of_spheres() -> None:
    """Two isotropic Gaussians: |m|^2 + d (s - t)^2."""
    eye = np.eye(4)
    x = gaussian(np.zeros(4), 4 * eye, 100, 1)
    y = gaussian(np.full(4, 3.0), 9 * eye, 120, 2)
    assert distribution.fid(x, y) == pytest.approx(4 * 9 + 4 * (2 - 3) ** 2, rel=1e-5)


def test_fewer_samples_than_features() -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(7, 20))), torch.from_numpy(rng.normal(size=(9, 20)) + 0.5)
    found = distribution.frechet_distance(x, y)
    want = closed_form(x.mean(0).numpy(), np.cov(x.numpy().T), y.mean(0).numpy(), np.cov(y.numpy().T))
    assert found == pytest.approx(want, rel=1e-6)


def test_kid_is_the_unbiased_estimate_with_the_cubic_kernel() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60, 5)) + np.array([0, 0.7])[:, None, None]
    found, deviation = distribution.kid(torch.from_numpy(x), torch.from_numpy(y))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (60 * 59) for z in (x, y))
    want = own - 2 * kernel(x, y).mean()
    assert found == pytest.approx(want, abs=3 * deviation / np.sqrt(100) + 0.1 * want)
    assert 0 < deviation < want
    assert distribution.kid(torch.from_numpy(x), torch.from_numpy(y)) == (found, deviation)  # seeded
    same = torch.from_numpy(rng.normal(size=(80, 5)))
    assert abs(distribution.kid(same[:40], same[40:])[0]) < found / 2


def test_inception_score_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found, deviation = distribution.inception_score(torch.from_numpy(logits))
    assert (found, deviation) == (pytest.approx(1), pytest.approx(0))  # one picture a split
    tenfold = torch.from_numpy(np.repeat(logits, 400, axis=0))
    want = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert distribution.inception_score(tenfold)[0] == pytest.approx(want, rel=0.05)


def colours(device: str):
    """Features that a test can compute: mean colour of each frame."""
    return lambda planes: planes.mean((2, 3))


OWN = Extractor("mean-colour", colours)


def clips(count: int, shift: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.clip(rng.normal(0.4 + shift, 0.1, (4, 8, 8, 3)), 0, 1) * np.ones((4, 1, 1, 1)) for _ in range(count)]


def test_results_carry_what_they_were_made_with() -> None:
    references, near, far = clips(8, 0, 0), clips(8, 0, 1), clips(8, 0.3, 2)
    own = {"fid": OWN, "kid": OWN, "fvd": Extractor("clip-mean", lambda device: lambda planes: planes.mean((0, 2, 3)))}
    good = distribution.evaluate(iter(near), iter(references), ["fid", "kid", "fvd"], extractors=own)
    bad = distribution.evaluate(far, references, ["fid", "kid", "fvd"], extractors=own)
    for name in ("fid", "kid", "fvd"):
        assert bad[name]["value"] > 3 * abs(good[name]["value"])
        assert good[name]["floor"] == bad[name]["floor"] < bad[name]["value"]
    assert good["kid"]["std"] > 0
    assert good["fid"]["std"] is None
    assert good["fvd"]["extractor"] == "clip-mean"
    assert {k: good["fid"][k] for k in ("extractor", "clips", "frames", "reference_frames")} == {
        "extractor": "mean-colour",
        "clips": 8,
        "frames": 32,
        "reference_frames": 32,
    }
    shared = distribution.evaluate(near, references, ["fid", "kid"], extractors={"kid": OWN})
    assert [shared[name]["extractor"] for name in ("fid", "kid")] == ["mean-colour"] * 2
    assert shared["fid"]["value"] == good["fid"]["value"]
    frames = torch.cat([torch.from_numpy(c).float().mean((1, 2)) for c in references]).double()
    half = torch.arange(32) // 4 % 2 == 0
    assert good["fid"]["floor"] == pytest.approx(distribution.fid(frames[half], frames[~half]), rel=1e-4)
    assert distribution.evaluate(near, references, ["fid"], extractors=own, floor=False)["fid"]["floor"] is None


def test_inception_and_clip_score_need_no_references() -> None:
    made = clips(3, 0, 0)
    score = Extractor("length", lambda device: lambda planes, prompt: float(len(prompt)))
    logits = Extractor("colours", lambda device: lambda planes: planes.mean((2, 3)) * 50)
    found = distribution.evaluate(
        made, [], ["is", "clip_score"], prompts=["a", "bb", "cccc"], extractors={"is": logits, "clip_score": score}
    )
    assert found["clip_score"]["value"] == pytest.approx(7 / 3)
    assert found["clip_score"]["std"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert found["is"]["value"] >= 1
    assert found["is"]["reference_frames"] == 0


def test_clip_score_is_torchmetrics_with_a_model_of_the_users(monkeypatch, tmp_path) -> None:
    """A tiny CLIP with random weights stands where the user's would lie in Hugging Face's cache."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
        "bos_token_id": 52,
        "eos_token_id": 53,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    letters = [chr(c) for c in range(97, 123)]
    words = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(str({w: i for i, w in enumerate(words)}).replace("'", '"'))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(feature_nets, "_CLIP", str(tmp_path / "clip"))
    assert distribution.available("clip_score", "official") is None
    clip = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    found = distribution.evaluate([clip], [], ["clip_score"], prompts=["abc"], profile="official")["clip_score"]
    inputs = processor(text=["abc"], images=list(clip), return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model(**inputs)
    cosine = (out.image_embeds @ out.text_embeds.T)[:, 0]
    assert found["value"] == pytest.approx(max(float(100 * cosine.mean()), 0), abs=0.05)
    assert found["extractor"] == "clip-vit-l14"


def test_errors() -> None:
    made, own = clips(2, 0, 0), {"fid": OWN, "kid": OWN}
    with pytest.raises(ValueError, match="must be one of fid, kid, is, clip_score, fvd, got 'fidd'"):
        distribution.evaluate(made, made, ["fidd"])
    with pytest.raises(ValueError, match="profile must be one of offline, official, got 'x'"):
        distribution.evaluate(made, made, ["fid"], profile="x")
    with pytest.raises(ValueError, match="at least one clip, got none"):
        distribution.evaluate([], made, ["fid"], extractors=own)
    with pytest.raises(ValueError, match="kid needs at least 4 frames on each side, got 2 and 8"):
        distribution.evaluate([made[0][:2]], made, ["kid"], extractors=own)
    broken = made[0].copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="reference 1 has 1 values that are NaN"):
        distribution.evaluate(made, [made[0], broken], ["fid"], extractors=own)
    with pytest.raises(ValueError, match="compares with prompts, and none"):
        distribution.evaluate(made, [], ["clip_score"], extractors={"clip_score": OWN})
    with pytest.raises(ValueError, match="one extractor, got two"):
        distribution.evaluate(made, made, ["fid", "kid"], extractors={"fid": OWN, "kid": Extractor("b", colours)})
    with pytest.raises(ValueError, match=r"'clip_score' cannot be used under profile 'offline': .*no package carries"):
        distribution.evaluate(made, [], ["clip_score"], prompts=["a", "b"])
    length = Extractor("length", lambda device: lambda planes, prompt: 1.0)
    for prompts, message in ((["a"], "more clips than prompts"), (["a"] * 3, "one prompt for each clip, got 3 for 2")):
        with pytest.raises(ValueError, match=message):
            distribution.evaluate(made, [], ["clip_score"], prompts=prompts, extractors={"clip_score": length})


def test_official_inception_is_asked_for_and_never_fetched(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reason = distribution.available("fid", "official")
    assert reason is not None
    assert "torch-fidelity" in reason
    path = tmp_path / "checkpoints" / feature_nets._INCEPTION
    path.parent.mkdir()
    path.write_bytes(b"something else")
    monkeypatch.setattr(feature_nets.importlib.util, "find_spec", lambda name: object())
    assert distribution.available("fid", "official") is None
    with pytest.raises(ValueError, match=r"6726825d\.pth has SHA-256 .*, which its name does not begin"):
        distribution.evaluate(clips(2, 0, 0), clips(2, 0, 1), ["fid"], profile="official")
    assert "I3D" in str(distribution.available("fvd", "official"))


def test_descriptor_of_a_clip() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    want = [3, 4, np.sqrt(8 / 3), np.sqrt(8), 2, 3]
    torch.testing.assert_close(drift.describe(features), torch.tensor(want, dtype=torch.float64))
    assert drift.describe(features[:1])[2:].abs().max() == 0


def test_drift_and_floor_with_the_real_extractor() -> None:
    need(drift.EXTRACTOR)
    from skimage import data

    picture = data.astronaut()
    a = np.stack([picture[20:148, 9 * i : 9 * i + 128] for i in range(4)])
    b = np.stack([picture[200:328, 9 * i : 9 * i + 128] for i in range(4)])
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 15, a.shape), 0, 255).astype(np.uint8)
    x, y, z = (torch.from_numpy(clip).float() / 255 for clip in (a, noisy, b))
    assert drift.clip_drift(x, x) == 0
    assert 0 < drift.clip_drift(y, x) < drift.clip_drift(z, x)
    assert drift.clip_drift(x.flip(0), x) < 1e-5  # a clip run backwards moves as much
    found = distribution.evaluate([a, noisy], [a, b], ["is", "fvd"])
    assert found["fvd"]["extractor"] == "efficientnet-lite0-clip"
    assert found["fvd"]["value"] > 0
    assert found["fvd"]["floor"] is None  # one clip a half
