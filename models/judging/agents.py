"""The interface of agents, which make a proposal or stay silent after each event, and the agents without a model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Answers, Candidate, Trace
from models.judging.description import Advance, Description, uncounted

# The offer of "always propose" without another agent. It fits any event, so the baseline measures the effect of never
# staying silent, not the quality of the task.
GENERIC_PROPOSAL = "Help with what the user is doing right now."


class AgentSession(Protocol):
    """A session that an agent observes event by event."""

    async def observe(self, event: Event) -> list[Candidate]:
        """Return the candidates after one more event, in order."""
        ...

    def note(self, event: Event) -> None:
        """Add one more event without answering after it."""
        ...


class Agent(Protocol):
    """Makes a proposal or stays silent after each event. To add a kind of agent, write a class with these methods.

    Examples:
        >>> class OffersOnErrors(Agent):
        ...     def describe(self):
        ...         return Description({"agent": "offers on errors"})
        ...     def session(self, name):
        ...         return OnErrors()
        ...     async def answer(self, traces, advance=uncounted):
        ...         sessions = [(trace, self.session(trace.name)) for trace in traces]
        ...         return {t.name: [await session.observe(event) for event in t.events] for t, session in sessions}
        >>> class OnErrors(AgentSession):
        ...     async def observe(self, event):
        ...         return [Candidate("Explain the error." if "error" in event.event else None)]
        >>> trace = Trace("a.json", (Event(time="0", event="The test raises an error."),), (False,))
        >>> import asyncio
        >>> asyncio.run(OffersOnErrors().answer([trace]))["a.json"][0][0].proposal
        'Explain the error.'
    """

    def describe(self) -> Description:
        """Return its settings and its source."""
        ...

    def session(self, name: str) -> AgentSession:
        """Start a session; its name selects the random stream of sampled answers."""
        ...

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        """Answer all events of traces.

        The answers equal those of one session per trace, with the trace's name. This method may be faster.

        Args:
            traces: The traces. An answer only depends on its event and the events before it.
            advance: Called after each candidate, for progress.
        """
        ...

    def release(self) -> None:
        """Free device memory until the next call; most agents use none."""
        return


@dataclass
class FixedSession(AgentSession):
    """A session with given candidates: one list per event, and `default` for events after the last list."""

    candidates: Sequence[Sequence[Candidate]]
    default: Candidate
    step: int = 0

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        return list(self.candidates[self.step - 1]) if self.step <= len(self.candidates) else [self.default]

    def note(self, event: Event) -> None:
        self.step += 1


class RecordedAgent(Agent):
    """Returns recorded answers: the first `candidates` of each event, or all if None."""

    def __init__(self, recorded: Answers, source: str, candidates: int | None = None) -> None:
        self.recorded = recorded
        self.source = source
        self.candidates = candidates

    def describe(self) -> Description:
        written = {
            name: [[candidate.written for candidate in step] for step in steps] for name, steps in self.recorded.items()
        }
        digest = hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16]
        return Description(
            {"agent": "recorded", "source": self.source, "answers": digest, "candidates": self.candidates}
        )

    def session(self, name: str) -> AgentSession:
        return FixedSession(self._answers_of(name), Candidate(None))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {trace.name: self._answers_of(trace.name) for trace in traces}

    def _answers_of(self, name: str) -> list[Sequence[Candidate]]:
        return [step[: self.candidates] for step in self.recorded[name]]


class NeverPropose(Agent):
    """Stays silent after every event."""

    def describe(self) -> Description:
        return Description({"agent": "never-propose"})

    def session(self, name: str) -> AgentSession:
        return FixedSession((), Candidate(None))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {trace.name: [[Candidate(None)] for _ in trace.events] for trace in traces}


class AlwaysPropose(Agent):
    """Proposes after every event: another agent's first proposal there, else `GENERIC_PROPOSAL`."""

    def __init__(self, others: Answers | None = None) -> None:
        self.others = others or {}

    def describe(self) -> Description:
        return Description({"agent": "always-propose"})

    def session(self, name: str) -> AgentSession:
        return FixedSession([[_first_offer(step)] for step in self.others.get(name, ())], _first_offer(()))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {
            trace.name: [[_first_offer(step)] for step in self.others.get(trace.name, [()] * len(trace.events))]
            for trace in traces
        }


def _first_offer(candidates: Sequence[Candidate]) -> Candidate:
    generic = Candidate(GENERIC_PROPOSAL, GENERIC_PROPOSAL)
    return next((candidate for candidate in candidates if candidate.proposal is not None), generic)
