"""Roles that run in this process: trained agents and reward classifiers, and baselines."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from datamodules.corpus.answers import Answer, read_answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from models.decoding.generation import AnswerStream
from models.judging.agents import Agent
from models.judging.judges import RewardJudge
from models.judging.local_agent import LocalAgent
from models.learning.calibration import DECISION
from proactive.simulation.asking import TRIES
from proactive.simulation.questions import InvalidAnswer, JudgeAnswer, Question, Role
from proactive.simulation.scenes import SimulatedSession
from proactive.simulation.simulation_log import SimulationLog

DIGITS = 4  # of P(accepted); further digits depend on the number of events in a forward pass


class TrainedRole(Role[SimulatedSession]):
    """A role of a trained model.

    The trained models of a simulation share one thread, so that they do not delay the requests of other sessions.

    Args:
        log: Keeps the answers.
        thread: An executor with one thread.
    """

    def __init__(self, log: SimulationLog, thread: Executor) -> None:
        self.log = log
        self.thread = thread

    async def reply(self, question: Question[Any], session: SimulatedSession, invalid: Sequence[InvalidAnswer]) -> str:
        attempt = len(invalid)
        key = self.log.key(session, question, attempt)
        if key not in self.log.texts:
            loop = asyncio.get_running_loop()
            text, finish_reason, seconds = await loop.run_in_executor(
                self.thread, self._timed, question, session, attempt
            )
            self.log.keep(session, question, attempt, text, finish_reason, seconds)
        return self.answer_in(self.log.final(key))

    def _timed(self, question: Question[Any], session: SimulatedSession, attempt: int) -> tuple[str, str | None, float]:
        begin = time.monotonic()
        text, finish_reason = self.compute(question, session, attempt)
        return text, finish_reason, round(time.monotonic() - begin, 3)

    @abstractmethod
    def compute(self, question: Question[Any], session: SimulatedSession, attempt: int) -> tuple[str, str | None]:
        """Return the model's text, and its finish reason if it has one. Runs in the thread."""

    def answer_in(self, text: str | None) -> str:
        """Return the answer that a text of `compute` contains, as JSON. The text is None if it was cut off."""
        return text or ""


class TrainedAssistant(TrainedRole):
    """A trained agent as the assistant.

    Each session keeps its KV cache from event to event. After a rejection, the new proposal is the agent's next
    candidate, because agents are not trained on reasons of rejections. An unreadable answer counts as silence, as in
    `evaluate agent`.
    """

    def __init__(self, agent: LocalAgent, log: SimulationLog, thread: Executor) -> None:
        super().__init__(log, thread)
        self.agent = agent
        self._streams: dict[str, AnswerStream] = {}  # by session

    def describe(self) -> dict[str, Any]:
        found = self.agent.describe()
        settings = {name: found.settings[name] for name in ("max_new_tokens", "constrained", "temperature", "seed")}
        return {"role": "checkpoint", **settings, "weights": found.weights}

    def compute(self, question: Question[Any], session: SimulatedSession, attempt: int) -> tuple[str, str | None]:
        events = _events(question)
        rejected = sum(one["events"] == len(events) for one in question.facts["rejected"])
        stream = self._streams.get(session.name) or self.agent.stream(session.seed)
        self._streams[session.name] = stream
        (answer,) = stream.answer(self.agent.data.segments(events), [rejected * TRIES + attempt])
        text = self.agent.data.tokenizer.decode(answer.token_ids)
        return text, "stop" if answer.finished else "length"

    def answer_in(self, text: str | None) -> str:
        return (read_answer(text or "") or Answer(proposal=None)).model_dump_json()

    def release(self, session: SimulatedSession) -> None:
        self._streams.pop(session.name, None)


class TrainedJudge(TrainedRole):
    """A reward classifier as the judge. It accepts if P(accepted) is above `DECISION`. It ignores no offer."""

    def __init__(self, judge: RewardJudge, log: SimulationLog, thread: Executor) -> None:
        super().__init__(log, thread)
        self.judge = judge

    def describe(self) -> dict[str, Any]:
        found = self.judge.describe()
        settings = {**found.settings, "weights": found.weights, "calibration": found.notes["calibration"]}
        return {"role": "checkpoint", **settings}

    def compute(self, question: Question[Any], session: SimulatedSession, attempt: int) -> tuple[str, str | None]:
        pair = Pair(tuple(_events(question)), question.facts["proposal"], session.name)
        (probability,) = self.judge.scorer.score([pair], session.name)
        answer = JudgeAnswer(
            judgment="accepted" if probability > DECISION else "rejected",
            reason=f"The user accepts with a probability of {probability:.2f}.",
            probability=round(probability, DIGITS),
        )
        return answer.model_dump_json(), None

    def release(self, session: SimulatedSession) -> None:
        self.judge.scorer.forget(session.name)


class BaselineAssistant(Role[SimulatedSession]):
    """A baseline as the assistant: it does the same after every event."""

    def __init__(self, agent: Agent, log: SimulationLog) -> None:
        self.agent = agent
        self.log = log

    def describe(self) -> dict[str, Any]:
        return {"role": "baseline", **self.agent.describe().settings}

    async def reply(self, question: Question[Any], session: SimulatedSession, invalid: Sequence[InvalidAnswer]) -> str:
        key = self.log.key(session, question, len(invalid))
        if key not in self.log.texts:
            (candidate,) = await self.agent.session(session.name).observe(_events(question)[-1])
            answer = Answer(proposal=candidate.proposal)
            self.log.keep(session, question, len(invalid), answer.model_dump_json())
        return self.log.texts[key]


def _events(question: Question[Any]) -> list[Event]:
    return [Event(**event) for event in question.facts["history"]]
