"""The report in a browser: every control does what it says, by mouse and by keyboard, with no error in the console."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_accel_eval.report import write_report

pytestmark = pytest.mark.slow

Open = Callable[..., Any]
Until = Callable[[Any, str], None]


@pytest.fixture(scope="module")
def report(build_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "run"
    return write_report(build_run(folder, missing=(("auto 0.2", 2),), errors=(("adaspa 0.2", 1),)))


def _pixels(page: Any, index: int) -> list[int]:
    found: list[int] = page.evaluate(
        """(i) => { const c = document.querySelectorAll("#screens canvas")[i];
        return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data); }""",
        index,
    )
    return found


def _frame(page: Any) -> int:
    return int(page.get_attribute("#player", "data-frame"))


def _ready(page: Any) -> None:
    page.wait_for_selector("#screens canvas")


def test_player_by_mouse(report: Path, open_page: Open, until: Until) -> None:
    page = open_page(report)
    _ready(page)
    assert page.locator("#screens canvas").count() == 3
    assert page.locator("#prompts [role=option]").count() == 4
    assert page.input_value("#choice") == "adaspa 0.2"  # the worst clip of the worst prompt
    before = _pixels(page, 0)
    page.click("#forth")
    assert _frame(page) == 1
    assert _pixels(page, 0) != before
    page.click("#back")
    page.click("#back")
    assert _frame(page) == 8  # round the end
    page.fill("#frame", "4")
    assert _frame(page) == 4
    page.locator("#prompts [role=option]").nth(2).click()
    until(page, "document.querySelectorAll('#prompts [aria-selected=true]')[0].id === 'prompt-2'")
    assert _frame(page) == 4
    page.select_option("#rate", "2")
    page.click("#play")
    until(page, "Number(document.getElementById('player').dataset.frame) !== 4")
    assert page.inner_text("#play") == "Pause"
    page.click("#play")
    stopped = _frame(page)
    page.wait_for_timeout(300)
    assert _frame(page) == stopped


def test_difference_is_that_of_the_pictures_times_the_gain(report: Path, open_page: Open) -> None:
    page = open_page(report)
    _ready(page)
    page.fill("#gain", "3")
    dense, fast, difference = (_pixels(page, i) for i in range(3))
    expected = [min(255, 3 * abs(a - b)) if i % 4 != 3 else 255 for i, (a, b) in enumerate(zip(dense, fast))]
    assert max(difference[::4]) > 0
    assert difference == expected


def test_wipe_and_all(report: Path, open_page: Open, until: Until) -> None:
    page = open_page(report)
    _ready(page)
    dense, fast = _pixels(page, 0), _pixels(page, 1)
    page.select_option("#view", "wipe")
    until(page, "document.querySelectorAll('#screens canvas').length === 1")
    page.fill("#wipe", "50")
    width = page.evaluate("document.querySelector('#screens canvas').width")
    wiped = _pixels(page, 0)
    row = 4 * width * 10  # the tenth row: left of the edge dense, right of it accelerated
    left, right = slice(row, row + 4 * (width // 2 - 3)), slice(row + 4 * (width // 2 + 3), row + 4 * width)
    assert wiped[left] == dense[left]
    assert wiped[right] == fast[right]
    assert page.is_hidden("#gain-label")
    assert page.is_visible("#wipe-label")
    page.select_option("#view", "all")
    until(page, "document.querySelectorAll('#screens canvas').length === 5")


def test_player_by_keyboard(report: Path, open_page: Open, until: Until) -> None:
    page = open_page(report)
    _ready(page)
    page.focus("#player")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert _frame(page) == 2
    page.keyboard.press("ArrowLeft")
    assert _frame(page) == 1
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelectorAll('#prompts [aria-selected=true]')[0].id === 'prompt-1'")
    page.keyboard.press("Home")
    until(page, "document.querySelectorAll('#prompts [aria-selected=true]')[0].id === 'prompt-0'")
    choice = page.input_value("#choice")
    page.keyboard.press("]")
    assert page.input_value("#choice") != choice
    page.keyboard.press("+")
    assert page.input_value("#gain") == "5"
    page.keyboard.press("Space")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.keyboard.press("Space")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    page.focus("#play")  # space presses the button, once
    page.keyboard.press("Space")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.keyboard.press("Space")
    page.focus("#frame")  # arrows belong to the slider
    page.fill("#frame", "3")
    page.keyboard.press("ArrowRight")
    assert _frame(page) == 4


def test_every_control_is_reached_by_tab_and_has_a_name(report: Path, open_page: Open) -> None:
    page = open_page(report)
    _ready(page)
    wanted = set(
        page.evaluate(
            "[...document.querySelectorAll('button, select, input')].filter(e => e.offsetParent).map(e => e.id)"
        )
    )
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert wanted <= reached
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, input, canvas[role=img], svg[role=img], [tabindex='0']")]
        .filter(e => !(e.labels && e.labels.length) && !e.getAttribute("aria-label") && !e.textContent.trim())
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_metric_and_density_controls(report: Path, open_page: Open) -> None:
    page = open_page(report)
    shown = "[...document.querySelectorAll('[data-pareto]')].filter(e => !e.hidden).map(e => e.dataset.pareto)"
    assert page.evaluate(shown) == ["0"]
    page.select_option("#pareto-metric", "2")
    assert page.evaluate(shown) == ["2"]
    page.focus("#density-map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "blocks.0.attn1, head 1, step 7: 45.0 % computed" in page.inner_text("#density-text")
    page.fill("#density-step", "0")
    assert "head 1, step 0: 100.0 % computed" in page.inner_text("#density-text")
    page.keyboard.press("ArrowDown")
    page.focus("#density-map")
    page.keyboard.press("ArrowDown")
    assert "not recorded" in page.inner_text("#density-text")
    page.select_option("#density-view", "steps")
    assert page.is_hidden("#density-step-label")
    assert "mean of heads" in page.inner_text("#density-text")
    page.select_option("#density-choice", "2")
    page.hover("#density-map", position={"x": 40, "y": 30})
    assert "blocks.0.attn1, step 0" in page.inner_text("#density-text")
    page.click("#samples summary")
    assert page.locator("#samples tbody tr").count() == 11


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844), (320, 640)])
def test_nothing_sticks_out(report: Path, open_page: Open, size: tuple[int, int], scheme: str) -> None:
    page = open_page(report, width=size[0], height=size[1], scheme=scheme)
    _ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    brightness = [sum(int(v) for v in c[4:-1].split(",")) for c in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    if os.environ.get("DIT_ACCEL_SCREENSHOTS"):
        page.screenshot(path=f"{os.environ['DIT_ACCEL_SCREENSHOTS']}/report-{size[0]}-{scheme}.png", full_page=True)
