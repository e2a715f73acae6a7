"""The agent of a checkpoint: answers whole traces, or one event at a time."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from datamodules.batching.answer_rows import AnswersDataModule
from datamodules.corpus.answers import Answer, read_answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Answers, Candidate, Trace
from datamodules.ranges import refuse_equal_samples
from models.decoding.answer_writer import AnswerWriter, GeneratedAnswer
from models.decoding.branch_checks import can_branch
from models.decoding.branches import reading_branches
from models.decoding.generation import AnswerStream, generate_answers
from models.decoding.grammar import AnswerGrammar
from models.judging.agents import Agent, AgentSession
from models.judging.answer_log import AnswerLog
from models.judging.answer_options import AnswerOptions
from models.judging.description import Advance, Description, uncounted
from models.judging.weights import Weights, best_device
from models.learning.proactive_agent import ProactiveAgent
from models.networks.configurations import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_TOKENS: list[int] = []  # replace the tokens of an event that is too old for any prompt


class LocalAgent(Agent):
    """A trained agent.

    Args:
        weights: The agent.
        options: How answers are generated.
        candidates: Number of answers per event.
        temperature: Sampling temperature; 0 is greedy.
        seed: Sampling seed.
        log: Keeps answers by session name. Answers that it already contains are not generated again.

    Raises:
        UserError: Several candidates at temperature 0 would be equal.
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
        refuse_equal_samples(candidates, temperature)
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
        """Return the candidate indices that a log lacks; `step` is the event index."""
        return [number for number in range(self.candidates) if answer_key(name, step, number) not in log.texts]

    def kept(self, log: AnswerLog, name: str, step: int) -> list[Candidate]:
        """Return the candidates in a log; a text that was cut off counts as unparsed."""
        texts = (log.final(answer_key(name, step, number)) for number in range(self.candidates))
        return [Candidate.of(read_answer(text or "")) for text in texts]

    def keep(self, log: AnswerLog, name: str, answer: GeneratedAnswer) -> bool:
        """Add an answer to a log; return False if the log already contains it."""
        key = answer_key(name, answer.step - 1, answer.candidate)
        if key in log.texts:
            return False
        text = self.data.tokenizer.decode(answer.token_ids)
        log.add(key, text, f"{name}, event {answer.step}", "stop" if answer.finished else "length")
        return True

    def read(self, answer: GeneratedAnswer) -> Answer | None:
        """Parse an answer; None if it was cut off."""
        return read_answer(self.data.tokenizer.decode(answer.token_ids)) if answer.finished else None

    def warm_up(self) -> None:
        """Answer once, so that the first answer of a session takes no longer than others."""
        self.stream("").answer(self.data.segments([Event(time="0", event="The user logs in.")]))

    def stream(self, name: str) -> AnswerStream:
        """Return the generator of answers for a new session."""
        return AnswerStream(
            self.network(),
            self.data.generation_prompt(),
            self.writer,
            candidates=self.candidates,
            max_length=self.max_length,
            stream=stream_of(name),
            branched=self.branched,
        )

    @cached_property
    def data(self) -> AnswersDataModule:
        """The data module that renders and tokenizes histories."""
        return self.weights.model.data_class.from_state(self.weights.state)

    @cached_property
    def writer(self) -> AnswerWriter:
        """The writer, which chooses tokens."""
        end_id = self.data.end_id
        grammar = AnswerGrammar(self.data.tokenizer, end_id, self.data.lead) if self.options.constrained else None
        return AnswerWriter(end_id, self.options.max_new_tokens, self.temperature, self.seed, grammar)

    @cached_property
    def max_length(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        network = self.weights.model.network
        assert network is not None, "a loaded agent has weights"
        return min(self.data.prompt_length + self.options.max_new_tokens, max_positions(network.config))

    @cached_property
    def branched(self) -> bool:
        """Whether the network can generate from a branched cache."""
        network = self.network()
        with reading_branches(network):
            return can_branch(network, self.max_length)

    def network(self) -> "PreTrainedModel":
        """Return the network on its device."""
        network = self.weights.model.network
        assert network is not None, "a loaded agent has weights"
        return network.to(best_device())

    def _write(self, traces: Sequence[Trace], log: AnswerLog, advance: Advance) -> None:
        """Generate the answers that a log lacks."""
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
            self.data.generation_prompt(),
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
    """A session of a trained agent, which computes each event once.

    Its memory is bounded. It keeps the tokens of as many latest events as a prompt can hold. Answers are kept only if
    the agent has a log.
    """

    def __init__(self, agent: LocalAgent, name: str) -> None:
        self.agent = agent
        self.name = name
        self._segments = agent.data.segments(())  # token ids of the instructions and of each event so far
        self._stream: AnswerStream | None = None

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        agent, step = self.agent, len(self._segments) - 2
        log = agent.log or AnswerLog()
        if agent.missing(log, self.name, step):
            self._stream = self._stream or agent.stream(self.name)
            for answer in self._stream.answer(self._segments):
                agent.keep(log, self.name, answer)
        return agent.kept(log, self.name, step)

    def note(self, event: Event) -> None:
        self._segments += self.agent.data.segments([event])[1:]
        too_old = len(self._segments) - 1 - self.agent.max_length  # index; an event has at least one token
        if too_old > 0:
            self._segments[too_old] = NO_TOKENS


def answer_key(name: str, step: int, number: int) -> str:
    """The log key of a candidate; `step` and `number` are the indices of event and candidate."""
    return json.dumps((name, step, number))


def stream_of(name: str) -> int:
    """The number of a session's random stream. It only depends on the name, so it is the same on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
