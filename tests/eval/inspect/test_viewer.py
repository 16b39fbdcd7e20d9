"""The page of a capture: complete, within its size, and every control does what it says."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dit_accel
from dit_accel_eval.inspect import Capture, capture, write_viewer
from dit_accel_eval.inspect.pack import pack

Open = Callable[..., Any]
Until = Callable[[Any, str], None]
TOKENS = [64 * f + 8 * y + x for f in (0, 2, 4) for y in (1, 4, 6) for x in (1, 4, 6)]
PROMPT = "whale </script><script>alert(1)</script> <b>x</b>"


@pytest.fixture(scope="module")
def taken(pipe: Any, call: dict[str, Any]) -> Capture:
    choosing = dit_accel.Method(name="choosing", order=("axes",), order_choice="recall", density=0.4, warmup=0.2)
    call = {**call, "output_type": "np"}
    return capture(pipe, PROMPT, methods=[choosing, "dense"], layers=[0, 1], steps=[0, 2, 4], tokens=TOKENS, **call)


@pytest.fixture(scope="module")
def page_file(taken: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_viewer(taken, tmp_path_factory.mktemp("viewer") / "attention.html")


def test_frames_are_pictures_of_the_grid(taken: Capture) -> None:
    assert {name: clip.shape for name, clip in taken.frames.items()} == {
        "choosing": (5, 128, 128, 3),
        "dense": (5, 128, 128, 3),
    }


def test_packed_numbers_come_back(taken: Capture) -> None:
    packed = pack(taken)
    index = next(i for i, look in enumerate(taken.looks) if look.ordered is not None)
    look, data = taken.looks[index], packed.data["looks"][index]

    def bytes_of(blob: int) -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b64decode(packed.blobs[blob])), np.uint8)

    levels = bytes_of(data["ordered"]["blob"]).reshape(look.raster.shape)
    peak = np.asarray(data["ordered"]["peak"])[:, None, None]
    assert np.allclose(peak * (levels / 255.0) ** 2, look.ordered.numpy(), atol=0.025 * peak.max())
    assert np.array_equal(bytes_of(data["kept"]).reshape(look.raster.shape) == 255, look.kept.numpy() != 0)
    rows = bytes_of(data["attention"]["blob"]).reshape(len(look.heads), len(taken.tokens), -1)
    peak = np.asarray(data["attention"]["peak"]).reshape(len(look.heads), -1, 1)
    assert np.allclose(peak * (rows / 255.0) ** 2, look.attention.numpy(), atol=0.025 * float(peak.max()))
    assert np.array_equal(bytes_of(data["visible"]).reshape(look.visible.shape), look.visible.numpy())
    own = look.attention.float().numpy().reshape(len(look.heads), len(taken.tokens), 5, 64).sum(-1)
    at = np.asarray(taken.tokens) // 64
    assert np.allclose(data["own"], own[:, np.arange(len(at)), at], atol=1e-4)
    assert np.allclose(data["extra"], 0, atol=1e-3)


def test_wide_maps_are_pooled(taken: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel_eval.inspect.pack._MOST_COLUMNS", 3)
    packed = pack(taken)
    data = packed.data["looks"][0]
    assert (data["columns"], data["group"]) == (3, 2)
    levels = np.frombuffer(zlib.decompress(base64.b64decode(packed.blobs[data["raster"]["blob"]])), np.uint8)
    masses = np.asarray(data["raster"]["peak"])[:, None, None] * (levels.reshape(2, 5, 3) / 255.0) ** 2
    assert np.allclose(masses.sum(-1), 1, atol=0.06)


def test_text_cannot_become_markup_and_the_size_is_kept(taken: Capture, tmp_path: Path) -> None:
    text = write_viewer(taken, tmp_path / "a.html").read_text()
    assert "<script>alert" not in text
    assert "<b>x</b>" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    assert data["prompt"] == PROMPT
    half = len(text.encode()) * 7 // 10
    smaller = write_viewer(taken, tmp_path / "b.html", max_bytes=half)
    assert smaller.stat().st_size <= half
    assert "of 27 captured, to keep the file small" in smaller.read_text()
    with pytest.raises(ValueError, match="capture fewer layers, heads, steps or methods"):
        write_viewer(taken, tmp_path / "c.html", max_bytes=1000)
    with pytest.raises(ValueError, match="holds no attention"):
        write_viewer(replace(taken, looks=()), tmp_path / "c.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def _state(page: Any) -> tuple[str, str]:
    return page.get_attribute("#viewer", "data-look"), page.get_attribute("#viewer", "data-token")


def _pixels(page: Any, selector: str) -> list[int]:
    found: list[int] = page.evaluate(
        """(s) => { const c = document.querySelector(s);
        return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data); }""",
        selector,
    )
    return found


def _chosen(method: str, layer: int, step: int, head: int) -> str:
    return f"document.getElementById('viewer').dataset.look === '{method}/{layer}/{step}/{head}'"


@pytest.mark.slow
def test_selectors_and_overlays(page_file: Path, open_page: Open, until: Until) -> None:
    page = open_page(page_file)
    page.wait_for_selector("#viewer[data-look]")
    assert page.get_attribute("#viewer", "data-look").startswith("choosing/")
    assert "of the softmax mass" in page.inner_text("#about")
    page.select_option("#layer", label="1 (blocks.1.attn1)")
    page.select_option("#step", "4")
    page.select_option("#head", "1")
    until(page, _chosen("choosing", 1, 4, 1))
    which = "#ordered" if page.is_visible("#ordered-box") else "#raster"
    veiled = _pixels(page, which)
    page.uncheck("#show-kept")
    until(page, f"document.querySelector('{which}').width > 0")
    page.wait_for_timeout(100)
    assert _pixels(page, which) != veiled
    bare = _pixels(page, "#raster")
    page.fill("#gain", "20")
    assert _pixels(page, "#raster") != bare
    frame = _pixels(page, "#frames button:nth-child(1) canvas")
    page.check("#only-seen")
    page.wait_for_timeout(100)
    assert _pixels(page, "#frames button:nth-child(1) canvas") != frame
    page.fill("#picture", "0")
    page.select_option("#method", "dense")
    until(page, _chosen("dense", 1, 4, 1))
    assert page.is_hidden("#ordered-box")
    assert page.is_disabled("#show-kept")
    assert "every block is computed" in page.inner_text("#about")


@pytest.mark.slow
def test_tokens_by_mouse_and_keyboard(page_file: Path, open_page: Open, until: Until, taken: Capture) -> None:
    page = open_page(page_file)
    page.wait_for_selector("#viewer[data-token]")
    assert page.locator("#frames button").count() == 5
    # The upper left corner of the first frame: the first token of the lattice is the nearest.
    page.click("#frames button:nth-child(1)", position={"x": 3, "y": 3})
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[0]}'")
    assert "frame 0, row 1, column 1" in page.inner_text("#token-text")
    assert page.get_attribute("#frames button:nth-child(1)", "aria-current") == "true"
    page.focus("#viewer")
    page.keyboard.press("ArrowRight")
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[1]}'")
    page.keyboard.press("ArrowDown")
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[4]}'")
    page.keyboard.press(">")
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[13]}'")
    page.keyboard.press("<")
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[4]}'")
    before = _state(page)[0]
    page.keyboard.press("]" if before.endswith("/0") else "[")
    until(page, f"document.getElementById('viewer').dataset.look !== '{before}'")
    page.keyboard.press("k")
    assert not page.is_checked("#show-kept")
    page.keyboard.press("o")
    assert page.is_checked("#only-seen")
    page.hover("#raster", position={"x": 20, "y": 20})
    assert "query block 0, key block 0" in page.inner_text("#map-text")
    box = page.locator("#raster").bounding_box()
    page.click("#raster", position={"x": 20, "y": box["height"] - 5})
    until(page, "Number(document.getElementById('viewer').dataset.token) >= 256")
    page.select_option("#token", "0")
    until(page, f"document.getElementById('viewer').dataset.token === '{taken.tokens[0]}'")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_nothing_sticks_out(page_file: Path, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(page_file, width=width, scheme=scheme)
    page.wait_for_selector("#viewer[data-token]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if os.environ.get("DIT_ACCEL_SCREENSHOTS"):
        page.screenshot(path=f"{os.environ['DIT_ACCEL_SCREENSHOTS']}/viewer-{width}-{scheme}.png", full_page=True)
