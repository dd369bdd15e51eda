"""Settings and fixtures that all tests share.

Each test process uses one thread: several processes with several threads each would wait for one another. Each test
starts from the same seed, whatever ran before it in its process, so a network built without a seed is the same in
every order.

Tests of pages ask for ``visit``, which opens them in the Chromium of this machine, and for ``complaints``.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:  # Playwright may be missing: only the tests that need it are then skipped
    from playwright.sync_api import Browser, Locator, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of modules, which build networks too
def pytest_runtest_setup(item):
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    """Chromium, driven by Playwright. One per module: while it runs, no other test can run an event loop."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        # visible scrollbars take room from the page, as they do on a reader's screen
        yield playwright.chromium.launch(executable_path=program, args=FLAGS, ignore_default_args=["--hide-scrollbars"])


@pytest.fixture
def complaints() -> list[str]:
    """What went wrong on the pages visited: console messages, exceptions, failed requests, requests to a network."""
    return []


@pytest.fixture
def visit(chromium: "Browser", complaints: list[str]) -> "Iterator[Callable[..., Page]]":
    """Open a page without a network and wait for it: ``visit(url, width=360, dark=True)``.

    Below 600 px the page is shown as on a phone, with its viewport and without room for scrollbars.
    """
    contexts = []

    def open_page(url: str, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            is_mobile=width < 600,
            color_scheme="dark" if dark else "light",
            offline=True,
        )
        contexts.append(context)
        context.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        context.on("weberror", lambda found: complaints.append(f"exception: {found.error}"))
        context.on("requestfailed", lambda request: complaints.append(f"failed: {request.url} {request.failure}"))
        context.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:")) or complaints.append(f"request: {request.url}"),
        )
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def click_at() -> "Callable[[Locator, float], None]":
    """Click on an element at a share of its width, 0 for its left edge: ``click_at(slider, 0.25)``."""

    def click(element: "Locator", share: float) -> None:
        box = element.bounding_box()
        element.click(position={"x": share * box["width"], "y": box["height"] / 2})

    return click
