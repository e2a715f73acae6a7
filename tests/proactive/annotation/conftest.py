"""A real browser: the system's chromium, driven by playwright; tests skip where there is none."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.patience import HANG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = os.environ.get("PROACTIVE_AXE")  # axe.min.js of npm's axe-core; .ci/run fetches it


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of its own; threads cannot share one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # the tests' own pages
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, link: str, expected: str = "", **options: Any) -> Iterator[Any]:
    """A page of a browser that remembers nothing; what its console says must be nothing, or hold `expected`."""
    context = browser.new_context(**options)
    context.set_default_timeout(HANG * 1000)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.goto(link)
    yield page
    context.close()
    assert [message for message in said if not expected or expected not in message] == []


@pytest.fixture(scope="module")  # while it is open, an event loop runs, and other tests start their own
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    pytest.importorskip("playwright", reason="playwright drives the browser: pip install playwright")
    with chromium() as opened:
        yield opened


@pytest.fixture
def faults(browser: Any) -> Callable[[Any], list[str]]:
    """What axe-core finds wrong with a page, a line each."""
    if AXE is None:
        pytest.skip("PROACTIVE_AXE names no axe.min.js: npm pack axe-core has one")
    script = Path(AXE).read_text(encoding="utf-8")

    def look(page: Any) -> list[str]:
        page.evaluate(script)
        found = page.evaluate("axe.run()")
        assert found["passes"]
        return [f"{fault['id']}: {node['html']}" for fault in found["violations"] for node in fault["nodes"]]

    return look
