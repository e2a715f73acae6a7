"""Agents: whatever answers the events of traces. One more is one more class with `settings` and `answer`."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Le

from datamodules.agent import AgentDataModule
from datamodules.answers import read_answer
from datamodules.chat import ChatPrompt
from datamodules.errors import UserError
from datamodules.ranges import FINITE, Count, refuse_unsound
from datamodules.traces import Answers, Candidate, Recorded, Trace
from models.agent import ProactiveAgent
from models.backbone import position_room
from models.endpoint import AnswerLog, Counter, Endpoint, Session
from models.generation import generate_answers
from models.grammar import AnswerGrammar
from models.weights import Weights

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


class LocalAgent:
    """Trained agents; each trace has one of them, see `models.weights.assign`.

    Args:
        assigned: The weights of each trace, by its name.
        options: How answers are written.
        candidates: Answers to each event.
        temperature: Of sampling; 0 takes the likeliest tokens.
        seed: Of sampling.

    Raises:
        UserError: Several candidates are asked for that would be the same.
    """

    def __init__(
        self,
        assigned: Mapping[str, Weights[ProactiveAgent]],
        options: AnswerOptions,
        candidates: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        _refuse_equal_candidates(candidates, temperature)
        self.assigned = assigned
        self.options = options
        self.candidates = candidates
        self.temperature = temperature
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "agent": "checkpoint",
            "weights": {name: weights.digest for name, weights in self.assigned.items()},
            "max_new_tokens": self.options.max_new_tokens,
            "constrained": self.options.constrained,
            "candidates": self.candidates,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def answer(self, traces: Sequence[Trace], log: AnswerLog, count: Counter) -> Answers:
        keys = [(t.name, step, n) for t in traces for step in range(len(t.events)) for n in range(self.candidates)]
        with count("answering", len(keys)) as advance:
            for key in keys:
                if json.dumps(key) in log.texts:
                    advance()
            for weights in {weights.digest: weights for weights in self.assigned.values()}.values():
                self._write(weights, traces, log, advance)
        answers: dict[str, list[list[Candidate]]] = {trace.name: [[] for _ in trace.events] for trace in traces}
        for name, step, number in keys:
            text = log.final(json.dumps((name, step, number)))
            answers[name][step].append(Candidate.of(read_answer(text or "")))
        return answers

    def _write(
        self, weights: Weights[ProactiveAgent], traces: Sequence[Trace], log: AnswerLog, advance: Callable[[], None]
    ) -> None:
        """Add the answers that these weights owe to the log."""
        network = weights.model.network
        assert network is not None, "a loaded agent has weights"
        data = AgentDataModule.from_state(weights.state)
        end_id = data.tokenizer.eos_token_id
        wanted = {
            (place, step + 1)
            for place, trace in enumerate(traces)
            for step in range(len(trace.events))
            if self.assigned[trace.name].digest == weights.digest
            and any(json.dumps((trace.name, step, number)) not in log.texts for number in range(self.candidates))
        }
        if not wanted:
            return
        answers = generate_answers(
            network.to("cuda" if torch.cuda.is_available() else "cpu"),
            [data.segments(trace.events) for trace in traces],
            data.opening(),
            end_id=end_id,
            max_new_tokens=self.options.max_new_tokens,
            batch_size=self.options.traces_at_once,
            candidates=self.candidates,
            temperature=self.temperature,
            seed=self.seed,
            grammar=AnswerGrammar(data.tokenizer, end_id) if self.options.constrained else None,
            max_length=min(data.prompt_length + self.options.max_new_tokens, position_room(network.config)),
            wanted=wanted,
        )
        for answer in answers:
            name, step = traces[answer.trace].name, answer.step - 1
            key = json.dumps((name, step, answer.candidate))
            if key not in log.texts:
                text = data.tokenizer.decode(answer.token_ids)
                log.add(key, text, f"{name}, event {step + 1}", "stop" if answer.finished else "length")
                advance()


class EndpointAgent:
    """A chat model behind an endpoint, asked once for each candidate; candidates differ by their seed.

    Raises:
        UserError: Several candidates are asked for that would be the same.
    """

    def __init__(self, endpoint: Endpoint, prompt: ChatPrompt, candidates: int = 1) -> None:
        _refuse_equal_candidates(candidates, endpoint.temperature)
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
            answers[trace.name][step].append(Candidate.of(read_answer(text or "", self.prompt.text)))
        return answers

    def _task(self, trace: Trace, step: int, number: int) -> Callable[[Session], Awaitable[str | None]]:
        messages = self.prompt.messages(trace.history(step))
        return lambda session: session.ask(messages, f"{trace.name}, event {step + 1}", number)


def _refuse_equal_candidates(candidates: int, temperature: float) -> None:
    if candidates > 1 and temperature == 0:
        raise UserError(
            f"--candidates: {candidates} candidates at temperature 0 are the same one", "Give a --temperature above 0."
        )
    if temperature < 0:
        raise UserError(f"--temperature: {temperature} is below 0", "Give 0 for the likeliest tokens, or more.")
