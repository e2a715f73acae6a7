"""The agent behind a chat endpoint: one request per candidate."""

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


class EndpointAgent(Agent):
    """A chat model behind an endpoint, with one request per candidate; candidates differ by their seed.

    Args:
        client: The client of the endpoint.
        prompt: The prompt.
        candidates: Number of answers per event.
        latest: Number of latest events that a session sends; all if None.

    Raises:
        UserError: Several candidates at temperature 0 would be equal.
    """

    def __init__(self, client: ChatClient, prompt: ChatPrompt, candidates: int = 1, latest: int | None = None) -> None:
        refuse_equal_samples(candidates, client.endpoint.temperature)
        self.client = client
        self.prompt = prompt
        self.candidates = candidates
        self.latest = latest

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
    """A session of a model behind an endpoint; each request contains the whole history, or its `latest` events."""

    def __init__(self, agent: EndpointAgent, name: str) -> None:
        self.agent = agent
        self.name = name
        self._history: deque[Event] = deque(maxlen=agent.latest)
        self._events = 0

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        step, history = self._events - 1, tuple(self._history)
        numbers = range(self.agent.candidates)
        return await self.agent.client.gather(
            self.agent.candidate(self.name, step, history, number) for number in numbers
        )

    def note(self, event: Event) -> None:
        self._history.append(event)
        self._events += 1
