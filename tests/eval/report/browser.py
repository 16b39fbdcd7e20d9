"""Fixtures that drive headless Chromium; loaded by the conftest files beside and below."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that want it are skipped where there is none.

    One a module: two folders have this fixture, and Playwright cannot be started twice at a time.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file as a user would, and fail at the end of the test on any console error or request."""
    contexts, complaints = [], []

    def open_(path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url)
        )
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(path.resolve().as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="session")
def until() -> Callable[[Any, str], None]:
    """Wait for an expression to become true. Playwright's own way is an `eval` in the page, which its policy forbids."""

    def wait(page: Any, expression: str, seconds: float = 10.0) -> None:
        for _ in range(round(seconds / 0.025)):
            if page.evaluate(expression):
                return
            page.wait_for_timeout(25)
        raise AssertionError(f"this did not become true: {expression}")

    return wait
