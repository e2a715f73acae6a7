"""Agents: whatever proposes something, or nothing, after each event of a session."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Protocol

from annotated_types import Ge, Le

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.corpus.answers import Answer, read_answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Answers, Candidate, Trace
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ChatPrompt
from datamodules.ranges import FINITE, Count, refuse_unsound
from models.decoding.branches import can_branch, reading_branches
from models.decoding.generation import AnswerStream, AnswerWriter, GeneratedAnswer, generate_answers
from models.decoding.grammar import AnswerGrammar
from models.judging.answer_log import AnswerLog
from models.judging.description import Advance, Description, uncounted
from models.judging.endpoint import ChatClient
from models.judging.weights import Weights, best_device
from models.learning.proactive_agent import ProactiveAgent
from models.networks.backbone import position_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What "always propose" offers where no agent says what: something that fits any event, so that the baseline shows
# what never staying silent is worth, not what a good task is.
GENERIC_PROPOSAL = "Help with what the user is doing right now."


class AgentSession(Protocol):
    """A session that an agent follows, event by event."""

    async def observe(self, event: Event) -> list[Candidate]:
        """The candidates after one more event, in order."""
        ...


class Agent(Protocol):
    """Proposes something, or nothing, after each event. One more agent is one more class with these methods."""

    def describe(self) -> Description:
        """What it is."""
        ...

    def session(self, name: str) -> AgentSession:
        """A new session; sampled answers follow from its name."""
        ...

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        """What sessions give that are named as the traces and fed with their events, sooner.

        Args:
            traces: The events. An answer depends on its event and those before it alone.
            advance: Is called after each candidate.
        """
        ...

    def release(self) -> None:
        """Free a device's memory until the next call; most have none."""
        return


@dataclass
class KnownSession(AgentSession):
    """A session whose candidates are known: a list for each event; after its end, and without one, `otherwise`."""

    candidates: Sequence[Sequence[Candidate]]
    otherwise: Candidate
    step: int = 0

    async def observe(self, event: Event) -> list[Candidate]:
        self.step += 1
        known = self.candidates[self.step - 1 : self.step]
        return list(known[0]) if known else [self.otherwise]


class RecordedAgent(Agent):
    """Gives what is recorded: of each event the first `candidates`, or all if None."""

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
        return KnownSession(self._of(name), Candidate(None))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {trace.name: self._of(trace.name) for trace in traces}

    def _of(self, name: str) -> list[Sequence[Candidate]]:
        return [step[: self.candidates] for step in self.recorded[name]]


class NeverPropose(Agent):
    """Stays silent after every event."""

    def describe(self) -> Description:
        return Description({"agent": "never-propose"})

    def session(self, name: str) -> AgentSession:
        return KnownSession((), Candidate(None))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {trace.name: [[Candidate(None)] for _ in trace.events] for trace in traces}


class AlwaysPropose(Agent):
    """Proposes after every event: what another agent's first proposal there is, else `GENERIC_PROPOSAL`."""

    def __init__(self, others: Answers | None = None) -> None:
        self.others = others or {}

    def describe(self) -> Description:
        return Description({"agent": "always-propose"})

    def session(self, name: str) -> AgentSession:
        return KnownSession([[_first_offer(step)] for step in self.others.get(name, ())], _first_offer(()))

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        return {
            trace.name: [[_first_offer(step)] for step in self.others.get(trace.name, [()] * len(trace.events))]
            for trace in traces
        }


def _first_offer(candidates: Sequence[Candidate]) -> Candidate:
    generic = Candidate(GENERIC_PROPOSAL, GENERIC_PROPOSAL)
    return next((candidate for candidate in candidates if candidate.proposal is not None), generic)


@dataclass(frozen=True)
class AnswerOptions:
    """How a trained agent writes its answers.

    Args:
        max_new_tokens: Tokens of an answer, at most; a longer one is closed there, and is not read.
        constrained: Whether a grammar holds answers to JSON.
        traces_at_once: Traces read side by side.
    """

    max_new_tokens: Count = 256
    constrained: bool = True
    traces_at_once: Annotated[int, Ge(1), Le(4096), FINITE] = 4

    def __post_init__(self) -> None:
        refuse_unsound(type(self), asdict(self), "agent.answers")


class LocalAgent(Agent):
    """A trained agent.

    Args:
        weights: The agent.
        options: How answers are written.
        candidates: Answers to each event.
        temperature: Of sampling; 0 takes the likeliest tokens.
        seed: Of sampling.
        log: Keeps answers, by the names of sessions; what it holds is not written again.

    Raises:
        UserError: Several candidates are asked for that would be the same.
    """

    def __init__(
        self,
        weights: Weights[ProactiveAgent],
        options: AnswerOptions | None = None,
        candidates: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        log: AnswerLog | None = None,
    ) -> None:
        _refuse_equal_candidates(candidates, temperature)
        self.weights = weights
        self.options = options or AnswerOptions()
        self.candidates = candidates
        self.temperature = temperature
        self.seed = seed
        self.log = log

    def describe(self) -> Description:
        settings = {
            "agent": "checkpoint",
            "max_new_tokens": self.options.max_new_tokens,
            "constrained": self.options.constrained,
            "candidates": self.candidates,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        return Description(settings, "answering", self.weights.digest, self.weights.source)

    def session(self, name: str) -> "LocalSession":
        return LocalSession(self, name)

    async def answer(self, traces: Sequence[Trace], advance: Advance = uncounted) -> Answers:
        log = self.log or AnswerLog()
        steps = [(trace.name, step) for trace in traces for step in range(len(trace.events))]
        for name, step in steps:
            for _ in range(self.candidates - len(self.missing(log, name, step))):
                advance()
        self._write(traces, log, advance)
        answers: dict[str, list[list[Candidate]]] = {trace.name: [] for trace in traces}
        for name, step in steps:
            answers[name].append(self.kept(log, name, step))
        return answers

    def release(self) -> None:
        self.weights.model.cpu()

    def missing(self, log: AnswerLog, name: str, step: int) -> list[int]:
        """The numbers of the candidates after an event, counted from 0, of a session that a log lacks."""
        return [number for number in range(self.candidates) if answer_key(name, step, number) not in log.texts]

    def kept(self, log: AnswerLog, name: str, step: int) -> list[Candidate]:
        """The candidates in a log; a text that was cut off is no answer."""
        texts = (log.final(answer_key(name, step, number)) for number in range(self.candidates))
        return [Candidate.of(read_answer(text or "")) for text in texts]

    def keep(self, log: AnswerLog, name: str, answer: GeneratedAnswer) -> bool:
        """Put an answer into a log; whether it was not there."""
        key = answer_key(name, answer.step - 1, answer.candidate)
        if key in log.texts:
            return False
        text = self.data.tokenizer.decode(answer.token_ids)
        log.add(key, text, f"{name}, event {answer.step}", "stop" if answer.finished else "length")
        return True

    def read(self, answer: GeneratedAnswer) -> Answer | None:
        """What was answered; None where it was cut off."""
        return read_answer(self.data.tokenizer.decode(answer.token_ids)) if answer.finished else None

    def stream(self, name: str) -> AnswerStream:
        """What writes the answers of a new session of that name."""
        return AnswerStream(
            self.network(),
            self.data.opening(),
            self.writer,
            candidates=self.candidates,
            max_length=self.max_length,
            stream=stream_of(name),
            branched=self.branched,
        )

    @cached_property
    def data(self) -> AgentDataModule:
        """What renders and tokenizes histories."""
        return AgentDataModule.from_state(self.weights.state)

    @cached_property
    def writer(self) -> AnswerWriter:
        """What chooses tokens."""
        end_id = self.data.tokenizer.eos_token_id
        grammar = AnswerGrammar(self.data.tokenizer, end_id) if self.options.constrained else None
        return AnswerWriter(end_id, self.options.max_new_tokens, self.temperature, self.seed, grammar)

    @cached_property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        network = self.weights.model.network
        assert network is not None, "a loaded agent has weights"
        return min(self.data.prompt_length + self.options.max_new_tokens, position_room(network.config))

    @cached_property
    def branched(self) -> bool:
        """Whether the network's cache can hold branches."""
        network = self.network()
        with reading_branches(network):
            return can_branch(network, self.max_length)

    def network(self) -> "PreTrainedModel":
        """The network, on its device."""
        network = self.weights.model.network
        assert network is not None, "a loaded agent has weights"
        return network.to(best_device())

    def _write(self, traces: Sequence[Trace], log: AnswerLog, advance: Advance) -> None:
        """Write the answers that a log lacks."""
        wanted = {
            (index, step + 1)
            for index, trace in enumerate(traces)
            for step in range(len(trace.events))
            if self.missing(log, trace.name, step)
        }
        if not wanted:
            return
        writer = self.writer
        answers = generate_answers(
            self.network(),
            [self.data.segments(trace.events) for trace in traces],
            self.data.opening(),
            end_id=writer.end_id,
            max_new_tokens=writer.max_new_tokens,
            batch_size=self.options.traces_at_once,
            candidates=self.candidates,
            temperature=writer.temperature,
            seed=writer.seed,
            grammar=writer.grammar,
            max_length=self.max_length,
            wanted=wanted,
            streams=[stream_of(trace.name) for trace in traces],
        )
        for answer in answers:
            if self.keep(log, traces[answer.trace].name, answer):
                advance()


class LocalSession(AgentSession):
    """A session of a trained agent; each event is read once."""

    def __init__(self, agent: LocalAgent, name: str) -> None:
        self.agent = agent
        self.name = name
        self.log = agent.log or AnswerLog()
        self._segments = agent.data.segments(())  # token ids of the instructions and of each event so far
        self._stream: AnswerStream | None = None

    async def observe(self, event: Event) -> list[Candidate]:
        agent, step = self.agent, len(self._segments) - 1
        self._segments += agent.data.segments([event])[1:]
        if agent.missing(self.log, self.name, step):
            self._stream = self._stream or agent.stream(self.name)
            for answer in self._stream.answer(self._segments):
                agent.keep(self.log, self.name, answer)
        return agent.kept(self.log, self.name, step)


def answer_key(name: str, step: int, number: int) -> str:
    """The key in a log of a local agent's candidate, counted from 0, after an event, counted from 0."""
    return json.dumps((name, step, number))


def stream_of(name: str) -> int:
    """The stream of random draws of a session of that name: the same on any machine, whatever else is answered."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class EndpointAgent(Agent):
    """A chat model behind an endpoint, asked once for each candidate; candidates differ by their seed.

    Raises:
        UserError: Several candidates are asked for that would be the same.
    """

    def __init__(self, client: ChatClient, prompt: ChatPrompt, candidates: int = 1) -> None:
        _refuse_equal_candidates(candidates, client.endpoint.temperature)
        self.client = client
        self.prompt = prompt
        self.candidates = candidates

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
            self.candidate(trace.name, trace.history(step), number, advance) for trace, step, number in asked
        )
        answers: dict[str, list[list[Candidate]]] = {trace.name: [[] for _ in trace.events] for trace in traces}
        for (trace, step, _), candidate in zip(asked, found, strict=True):
            answers[trace.name][step].append(candidate)
        return answers

    async def candidate(
        self, name: str, history: Sequence[Event], number: int, advance: Advance = uncounted
    ) -> Candidate:
        """The candidate of that number, counted from 0, after a history."""
        where = f"{name}, event {len(history)}"
        text = await self.client.ask(self.prompt.messages(history), where, number)
        advance()
        return Candidate.of(read_answer(text or "", self.prompt.text))


class EndpointSession(AgentSession):
    """A session of a model behind an endpoint, which is told the whole history each time."""

    def __init__(self, agent: EndpointAgent, name: str) -> None:
        self.agent = agent
        self.name = name
        self._history: list[Event] = []

    async def observe(self, event: Event) -> list[Candidate]:
        self._history.append(event)
        numbers = range(self.agent.candidates)
        return await self.agent.client.gather(
            self.agent.candidate(self.name, self._history, number) for number in numbers
        )


def _refuse_equal_candidates(candidates: int, temperature: float) -> None:
    if candidates > 1 and temperature == 0:
        raise UserError(
            f"--candidates: {candidates} candidates at temperature 0 are the same one", "Give a --temperature above 0."
        )
    if temperature < 0:
        raise UserError(f"--temperature: {temperature} is below 0", "Give 0 for the likeliest tokens, or more.")
