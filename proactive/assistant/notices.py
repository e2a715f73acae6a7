"""The interface that shows offers to the user and returns the answers.

To add a way to show offers, write a class with the methods of `Notices`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from proactive.assistant.deciding import Reply
from proactive.assistant.tools import ToolCall

OnAnswer = Callable[[int, bool], None]  # the number of an offer, and whether the user accepts it


@dataclass(frozen=True)
class Offer:
    """An offer, and what follows if the user accepts it.

    Attributes:
        number: The number of its event.
        proposal: The text of the offer.
        draft: The agent's text that is shown after an acceptance.
        call: The tool that runs after an acceptance, instead of a draft.
    """

    number: int
    proposal: str
    draft: str = ""
    call: ToolCall | None = None


class Notices(Protocol):
    """Shows one offer at a time."""

    def running(self, on_answer: OnAnswer) -> AbstractAsyncContextManager[object]:
        """Return the context in which offers can be shown.

        Args:
            on_answer: To call in the event loop when the user answers. An answer to an offer that has ended is ignored.
        """
        ...

    async def show(self, offer: Offer) -> None:
        """Show an offer, and return at once."""
        ...

    async def end(self, offer: Offer, reply: Reply) -> None:
        """Stop showing an offer: it was answered, has expired, or is withdrawn."""
        ...


class RecordedNotices(Notices):
    """Answers offers with the recorded judgments of a trace. An offer without a judgment gets no answer.

    Args:
        judgments: The judgments, by the number of an event and the proposal after it.
    """

    def __init__(self, judgments: Mapping[tuple[int, str], bool]) -> None:
        self.judgments = judgments
        self._on_answer: OnAnswer | None = None

    def running(self, on_answer: OnAnswer) -> AbstractAsyncContextManager[object]:
        self._on_answer = on_answer
        return nullcontext()

    async def show(self, offer: Offer) -> None:
        accepted = self.judgments.get((offer.number, offer.proposal))
        if accepted is not None and self._on_answer:
            self._on_answer(offer.number, accepted)

    async def end(self, offer: Offer, reply: Reply) -> None:
        return
