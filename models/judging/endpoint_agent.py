"""An agent behind a chat endpoint."""

import json
from collections import deque
from collections.abc import Sequence

from datamodules.corpus.answers import read_answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Answers, Candidate, Trace
from datamodules.prompting.chat_prompts import ANSWER_FORMAT, ChatPrompt
from datamodules.ranges import refuse_equal_samples
from models.judging.agents import Agent, AgentSession
from models.judging.chat_client import ChatClient
from models.judging.description import Advance, Description, uncounted

BYTES_PER_TOKEN = 2  # SmolLM2 has 2.7 in the events of the published traces, and at least 1.9 in each


class EndpointAgent(Agent):
    """A chat model behind an endpoint, with one request per candidate; candidates differ by their seed.

    Args:
        client: The client of the endpoint.
        prompt: The prompt.
        candidates: Number of answers per event.
        latest_tokens: A session sends as many of the latest events as have about so many tokens, and at
            least the latest one; all if None.

    Raises:
        UserError: Several candidates at temperature 0 would be equal.
    """

    def __init__(
        self, client: ChatClient, prompt: ChatPrompt, candidates: int = 1, latest_tokens: int | None = None
    ) -> None:
        refuse_equal_samples(candidates, client.endpoint.temperature)
        self.client = client
        self.prompt = prompt
        self.candidates = candidates
        self.latest_tokens = latest_tokens

    def describe(self) -> Description:
        endpoint, prompt = self.client.endpoint, self.prompt.model_dump()
        settings = {"agent": "endpoint", **endpoint.settings, "candidates": self.candidates, "prompt": prompt}
        return Description(settings, f"asking {endpoint.model}", source=endpoint.url)

    def session(self, name: str) -> AgentSession:
        return EndpointSession(self, name)

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        steps = [(trace, step) for trace in traces for step in range(len(trace.events))]
        asked = [(trace, step, number) for trace, step in steps for number in range(self.candidates)]
        found = await self.client.gather(
            self.candidate(trace.name, step, trace.history(step), number, advance) for trace, step, number in asked
        )
        answers: dict[str, list[list[Candidate]]] = {trace.name: [[] for _ in trace.events] for trace in traces}
        for (trace, step, _), candidate in zip(asked, found, strict=True):
            answers[trace.name][step].append(candidate)
        return answers

    async def candidate(
        self, name: str, step: int, history: Sequence[Event], number: int, advance: Advance = uncounted
    ) -> Candidate:
        """Ask for one candidate, by index, after the history that ends with the event `step`, from 0."""
        where = f"{name}, event {step + 1}"
        text = await self.client.ask(self.prompt.messages(history), where, number, schema=ANSWER_FORMAT)
        advance()
        return Candidate.of(read_answer(text or "", self.prompt.text))


class EndpointSession(AgentSession):
    """A session of a model behind an endpoint; each request contains the whole history, or its latest events."""

    def __init__(self, agent: EndpointAgent, name: str) -> None:
        self.agent = agent
        self.name = name
        self._history: deque[tuple[Event, int]] = deque()  # with estimated tokens
        self._tokens = 0
        self._events = 0

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        step, history = self._events - 1, tuple(event for event, _ in self._history)
        numbers = range(self.agent.candidates)
        return await self.agent.client.gather(
            self.agent.candidate(self.name, step, history, number) for number in numbers
        )

    def note(self, event: Event) -> None:
        self._history.append((event, estimated_tokens(event)))
        self._tokens += self._history[-1][1]
        self._events += 1
        limit = self.agent.latest_tokens
        while limit is not None and self._tokens > limit and len(self._history) > 1:
            self._tokens -= self._history.popleft()[1]


def estimated_tokens(event: Event) -> int:
    """Estimate the number of tokens of an event in a prompt, since the server's tokenizer is not known.

    It is at least what SmolLM2's tokenizer, a small vocabulary, gives for nearly all English events.
    """
    return len(json.dumps(event.model_dump(), ensure_ascii=False, indent=1).encode()) // BYTES_PER_TOKEN + 1
