"""Agents: whatever answers the events of traces. One more is one more class with `settings` and `answer`."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from datamodules.answers import read_answer
from datamodules.chat import ChatPrompt
from datamodules.errors import UserError
from datamodules.traces import Answers, Candidate, Recorded, Trace
from models.endpoint import AnswerLog, Counter, Endpoint, Session

# What "always propose" offers where no agent says what: something that fits any event, so that the baseline shows
# what never staying silent is worth, not what a good task is.
GENERIC_PROPOSAL = "Help with what the user is doing right now."


class Agent(Protocol):
    """Proposes something, or nothing, after each event of some traces."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its answers follow from, in plain types: an evaluation goes on with the same settings only."""
        ...

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        """For each event of each trace, the candidates, in order.

        Args:
            traces: The events. An answer depends on its event and those before it alone.
            log: Where answers that are dear can be kept, for an evaluation that is killed and goes on.
            count: Shows progress.
        """
        ...


class RecordedAgent:
    """Gives what is recorded: of each event the first `candidates`, or all if None."""

    def __init__(self, recorded: Recorded, source: str, candidates: int | None = None) -> None:
        self.recorded = recorded
        self.source = source
        self.candidates = candidates

    @property
    def settings(self) -> dict[str, Any]:
        written = {
            name: [[candidate.written for candidate in step] for step in steps]
            for name, steps in self.recorded.answers.items()
        }
        digest = hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16]
        return {"agent": "recorded", "source": self.source, "answers": digest, "candidates": self.candidates}

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        return {trace.name: [step[: self.candidates] for step in self.recorded.answers[trace.name]] for trace in traces}


class NeverPropose:
    """Stays silent after every event."""

    settings: dict[str, Any] = {"agent": "never-propose"}  # noqa: RUF012 - a Protocol's property, as a constant

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        return {trace.name: [[Candidate(None)] for _ in trace.events] for trace in traces}


class AlwaysPropose:
    """Proposes after every event: what another agent's first proposal there is, else `GENERIC_PROPOSAL`."""

    settings: dict[str, Any] = {"agent": "always-propose"}  # noqa: RUF012 - as above

    def __init__(self, others: Answers | None = None) -> None:
        self.others = others

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        return {
            trace.name: [[self._candidate(trace.name, step)] for step in range(len(trace.events))] for trace in traces
        }

    def _candidate(self, trace: str, step: int) -> Candidate:
        others = self.others[trace][step] if self.others else ()
        generic = Candidate(GENERIC_PROPOSAL, GENERIC_PROPOSAL)
        return next((candidate for candidate in others if candidate.proposal is not None), generic)


class EndpointAgent:
    """A chat model behind an endpoint, asked once for each candidate; candidates differ by their seed.

    Raises:
        UserError: Several candidates are asked for that would be the same.
    """

    def __init__(self, endpoint: Endpoint, prompt: ChatPrompt, candidates: int = 1) -> None:
        if candidates > 1 and endpoint.temperature == 0:
            raise UserError(
                f"--candidates: {candidates} candidates at temperature 0 are the same one",
                "Give a --temperature above 0.",
            )
        self.endpoint = endpoint
        self.prompt = prompt
        self.candidates = candidates

    @property
    def settings(self) -> dict[str, Any]:
        prompt = self.prompt.model_dump()
        return {"agent": "endpoint", **self.endpoint.settings, "candidates": self.candidates, "prompt": prompt}

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        places = [
            (trace, step, number)
            for trace in traces
            for step in range(len(trace.events))
            for number in range(self.candidates)
        ]
        tasks = [self._task(*place) for place in places]
        answers: dict[str, list[list[Candidate]]] = {trace.name: [[] for _ in trace.events] for trace in traces}
        texts = self.endpoint.run(log, tasks, f"asking {self.endpoint.model}", count)
        for (trace, step, _), text in zip(places, texts, strict=True):
            answers[trace.name][step].append(Candidate.of(read_answer(text)))
        return answers

    def _task(self, trace: Trace, step: int, number: int) -> Callable[[Session], Awaitable[str]]:
        messages = self.prompt.messages(trace.history(step))
        return lambda session: session.ask(messages, f"{trace.name}, event {step + 1}", number)
