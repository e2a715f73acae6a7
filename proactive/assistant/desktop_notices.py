"""Offers as notifications of the desktop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from desktop_notifier import Button, DesktopNotifier

from datamodules.errors import UserError
from datamodules.escaping import error_text, printable, shortened
from proactive.assistant.deciding import Reply
from proactive.assistant.notices import Notices, Offer, OnAnswer
from proactive.terminal import say

MAX_TITLE = 300  # characters of an offer that are shown
NEVER = 0  # seconds until the desktop removes a notification by itself; the session ends it
QUESTION = "Click to accept, close to reject."


class DesktopNotices(Notices):
    """Shows one notification at a time.

    Clicking it or its button Accept accepts the offer. Closing it or its button Reject rejects it. The desktop does not
    say when a notification expires, so the session counts the time and removes it. The offer is the title, because a
    desktop may read markup in the text below it.
    """

    def __init__(self) -> None:
        self._notifier = DesktopNotifier(app_name="proactive")
        self._sending = asyncio.Lock()
        self._answers: set[asyncio.Task[None]] = set()
        self._delay_early_answers()
        self._on_answer: OnAnswer = lambda number, accepted: None
        self._shown: str | None = None  # the identifier of the notification

    def running(self, on_answer: OnAnswer) -> AbstractAsyncContextManager[object]:
        self._on_answer = on_answer
        return self._connected()

    async def show(self, offer: Offer) -> None:
        def accept() -> None:
            self._on_answer(offer.number, True)

        def reject() -> None:
            self._on_answer(offer.number, False)

        async with self._sending:
            self._shown = await self._notifier.send(
                shortened(printable(offer.proposal), MAX_TITLE),
                QUESTION,
                buttons=[Button("Accept", accept), Button("Reject", reject)],
                on_clicked=accept,
                on_dismissed=reject,
                timeout=NEVER,
            )

    async def end(self, offer: Offer, reply: Reply) -> None:
        if self._shown and reply in (Reply.IGNORED, Reply.WITHDRAWN):  # others have ended with the answer
            await self._notifier.clear(self._shown)
        self._shown = None
        if reply == Reply.ACCEPTED and offer.draft:
            say(f"          draft: {offer.draft}")

    def _delay_early_answers(self) -> None:
        """Lets answers wait until `send` has returned.

        A user can click before a busy event loop has read the identifier of the notification. The D-Bus backend of
        desktop-notifier 6.2 drops such an answer. Other backends choose the identifier themselves.
        """
        backend = self._notifier._backend
        for name in ("_on_action", "_on_closed"):
            if (handle := getattr(backend, name, None)) is not None:
                setattr(backend, name, self._once_sent(handle))

    def _once_sent(self, handle: Callable[[int, object], None]) -> Callable[[int, object], None]:
        async def wait_and_handle(identifier: int, what: object) -> None:
            async with self._sending:
                handle(identifier, what)

        def on_signal(identifier: int, what: object) -> None:
            task = asyncio.create_task(wait_and_handle(identifier, what))
            self._answers.add(task)  # the event loop does not keep it
            task.add_done_callback(self._answers.discard)

        return on_signal

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        try:
            await self._notifier.get_capabilities()
        except Exception as error:  # the library raises what its backend does
            raise UserError(
                f"--notify desktop: no notifications can be shown: {error_text(error, 300) or type(error).__name__}",
                "Start a notification server, or give --notify terminal or page.",
            ) from error
        yield
