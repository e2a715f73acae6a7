"""Offers in the terminal. The user answers with y or n and Enter, while the assistant goes on."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from proactive.assistant.deciding import Reply
from proactive.assistant.notices import Notices, Offer, OnAnswer
from proactive.terminal import say

ANSWERS = {"y": True, "yes": True, "n": False, "no": False}
LONGEST_LINE = 4096  # bytes that are read at once


class TerminalNotices(Notices):
    """Asks on standard output, and reads standard input without waiting. Without a terminal nobody answers."""

    def __init__(self) -> None:
        self._offer: Offer | None = None

    def running(self, on_answer: OnAnswer) -> AbstractAsyncContextManager[object]:
        return self._reading(on_answer)

    async def show(self, offer: Offer) -> None:
        self._offer = offer
        say(f"          {'? accept it: y or n, then Enter' if sys.stdin.isatty() else '(no terminal to answer in)'}")
        sys.stdout.flush()

    async def end(self, offer: Offer, reply: Reply) -> None:
        self._offer = None
        if reply == Reply.ACCEPTED and offer.draft:
            say(f"          draft: {offer.draft}")

    @contextlib.asynccontextmanager
    async def _reading(self, on_answer: OnAnswer) -> AsyncIterator[None]:
        if not sys.stdin.isatty():
            yield
            return
        loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()
        typed = b""

        def read() -> None:
            nonlocal typed
            part = os.read(descriptor, LONGEST_LINE)
            if not part:  # the terminal is closed
                loop.remove_reader(descriptor)
            typed = (typed + part)[-LONGEST_LINE:]
            while b"\n" in typed:
                line, _, typed = typed.partition(b"\n")
                answer = ANSWERS.get(line.decode(errors="replace").strip().lower())
                if answer is not None and self._offer is not None:
                    on_answer(self._offer.number, answer)

        loop.add_reader(descriptor, read)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
