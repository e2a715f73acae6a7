"""Offers on a page: in a browser, as a client sends them, and from where they must not come."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from proactive.assistant.deciding import Reply
from proactive.assistant.notices import Offer
from proactive.assistant.page_notices import PageNotices
from tests.proactive.annotation.conftest import page_of
from tests.proactive.annotation.serving import Client

SCRIPT = "<script>document.title = 'obeyed'</script>"


@dataclass
class Page:
    """A running page, what it answered, and a client that knows its link."""

    notices: PageNotices
    client: Client
    answers: list[tuple[int, bool]] = field(default_factory=list)

    async def ask(self, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self.client.ask, self.client.path, *arguments, **options)


@asynccontextmanager
async def served(capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Page]:
    notices, answers = PageNotices(), []
    async with notices.running(lambda number, accepted: answers.append((number, accepted))):
        link = re.search(r"^offers: (http://127.0.0.1:\d+/offers/\S+)$", capsys.readouterr().out, re.M)
        assert link is not None
        yield Page(notices, Client(link[1]), answers)


def form(number: int, answer: str) -> list[tuple[str, str]]:
    return [("number", str(number)), ("answer", answer)]


def test_an_offer_is_shown_answered_once_and_its_draft_follows(capsys: pytest.CaptureFixture[str]) -> None:
    async def session() -> None:
        async with served(capsys) as page:
            empty = await page.ask()
            assert ("No offer is open" in empty.text, empty.headers["refresh"]) == (True, "3")
            offer = Offer(7, f"Sum up {SCRIPT}", "The sum is 3.")
            await page.notices.show(offer)
            shown = await page.ask()
            assert "Sum up &lt;script&gt;" in shown.text
            assert "refresh" not in shown.headers
            assert "The sum is 3." not in shown.text, "the draft follows the acceptance"
            for wrong in (form(6, "yes"), form(7, "maybe"), [("answer", "yes")]):
                assert (await page.ask(wrong)).status == 303
            assert page.answers == []
            for _ in range(2):
                assert (await page.ask(form(7, "yes"))).status == 303
            assert page.answers == [(7, True)]
            await page.notices.end(offer, Reply.ACCEPTED)
            after = await page.ask()
            assert ("was accepted" in after.text, "The sum is 3." in after.text) == (True, True)
            await page.notices.show(Offer(9, "Wait.", "x"))
            await page.ask(form(9, "no"))
            await page.notices.end(Offer(9, "Wait.", "x"), Reply.REJECTED)
            assert page.answers == [(7, True), (9, False)]
            assert "<blockquote>" not in (await page.ask()).text

    asyncio.run(session())


def test_requests_without_the_token_or_of_other_sites_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    async def session() -> None:
        async with served(capsys) as page:
            await page.notices.show(Offer(1, "x"))
            assert (await page.ask(headers={"Host": "evil.example:80"})).status == 421
            assert (await page.ask(form(1, "yes"), headers={"Origin": "http://evil.example"})).status == 403
            assert (await page.ask(method="DELETE")).status == 405
            for path in ("/offers/nothing", "/", "/static/nothing"):
                assert (await asyncio.to_thread(page.client.ask, path)).status == 404
            assert page.answers == []

    asyncio.run(session())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_answers_in_a_browser_by_keyboard(
    browser: Any,
    faults: Callable[[Any], list[str]],
    capsys: pytest.CaptureFixture[str],
    scheme: str,
) -> None:
    """The browser's calls block, so the page runs in a loop of another thread."""
    ready, done, found = threading.Event(), threading.Event(), {}

    async def session() -> None:
        async with served(capsys) as page:
            await page.notices.show(Offer(3, "Sum up " + "averyveryverylongword" * 9))
            found.update(page=page)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(session()))
    thread.start()
    ready.wait()
    try:
        options = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
        with page_of(browser, found["page"].client.link, **options) as opened:
            assert opened.title() == "An offer"
            assert faults(opened) == []
            assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
            opened.keyboard.press("Tab")
            with opened.expect_navigation():
                opened.keyboard.press("Enter")
            assert opened.title() == "No offer"
            assert faults(opened) == []
        assert found["page"].answers == [(3, True)]
    finally:
        done.set()
        thread.join()
