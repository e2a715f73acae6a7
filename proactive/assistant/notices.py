"""How offers reach the user, and answers come back.

A new kind of notice is a new class with the methods of `Notices`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from proactive.assistant.acting import ToolCall
from proactive.assistant.deciding import Reply

Answered = Callable[[int, bool], None]  # the number of an offer, and whether the user accepts it


@dataclass(frozen=True)
class Offer:
    """What the user sees, and what follows if they accept it.

    Attributes:
        number: The number of its event.
        proposal: The offer.
        draft: The agent's text, which is shown then.
        call: The tool that the agent asks for instead.
    """

    number: int
    proposal: str
    draft: str = ""
    call: ToolCall | None = None


class Notices(Protocol):
    """Shows one offer at a time."""

    def running(self, answered: Answered) -> AbstractAsyncContextManager[object]:
        """Return the context in which offers can be shown.

        Args:
            answered: To call in the event loop when the user answers. Answers to an offer that has ended do no harm.
        """
        ...

    async def show(self, offer: Offer) -> None:
        """Show an offer, and return at once."""
        ...

    async def end(self, offer: Offer, reply: Reply) -> None:
        """Stop showing an offer: it was answered, has expired, or is withdrawn."""
        ...


class RecordedNotices(Notices):
    """Answers as a trace's judgments say. An offer without one is ignored.

    Args:
        judgments: By the number of an event and the proposal after it.
    """

    def __init__(self, judgments: Mapping[tuple[int, str], bool]) -> None:
        self.judgments = judgments
        self._answered: Answered | None = None

    def running(self, answered: Answered) -> AbstractAsyncContextManager[object]:
        self._answered = answered
        return nullcontext()

    async def show(self, offer: Offer) -> None:
        accepted = self.judgments.get((offer.number, offer.proposal))
        if accepted is not None and self._answered:
            self._answered(offer.number, accepted)

    async def end(self, offer: Offer, reply: Reply) -> None:
        return
