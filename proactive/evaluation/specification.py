"""Everything that an evaluation of an agent needs, checked and typed, before anything is asked or written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.corpus.records import AnnotatedRow, TraceSplit
from datamodules.corpus.traces import Trace
from models.judging.agents import Agent
from models.judging.answer_log import AnswerLog
from models.judging.endpoint import ChatClient
from models.judging.judges import Judge
from models.judging.weights import Tie

ROLES = ("agent", "judge", "gate")
STAMPS = {Tie.TRAINED: "trained_on", Tie.VALIDATED: "validated_on", Tie.UNKNOWN: "validation_unknown"}


@dataclass(frozen=True)
class Stamps:
    """What has to stand on everything that an evaluation leaves behind.

    Attributes:
        ties: By role, and by the name of a trace: what the weights have to do with it.
        traces_left_out: The names of the traces that are not answered, for the agent was trained on them.
        gate_is_judge: Whether the same weights hold offers back and judge them.
    """

    ties: Mapping[str, Mapping[str, Tie]]
    traces_left_out: list[str] = field(default_factory=list)
    gate_is_judge: bool = False

    def record(self) -> dict[str, Any]:
        """As metrics.json has it."""
        named = {
            f"{role}_{word}": [name for name, tie in self.ties.get(role, {}).items() if tie == kind]
            for role in ROLES
            for kind, word in STAMPS.items()
        }
        return {**named, "traces_left_out": self.traces_left_out, "gate_is_judge": self.gate_is_judge}

    @property
    def suffix(self) -> str:
        """What marks the files whose layout has no room for a stamp."""
        found = {tie for ties in self.ties.values() for tie in ties.values()}
        marks = [f"-{word.replace('_', '-')}" for kind, word in STAMPS.items() if kind in found]
        marks = ["-contaminated" if mark == "-trained-on" else mark for mark in marks]
        return "".join([*marks, *["-gate-is-judge"] * self.gate_is_judge])


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that can be carried out.

    Attributes:
        traces: What is answered.
        splits: Which traces make up which split.
        agents: By the name of a trace, who answers it: of several checkpoints one that was not trained on it.
        judges: The same of who judges it.
        gates: The same of what holds offers back; None without a gate.
        cost_ratio: What a false alarm costs, in missed needs.
        stamps: What agents, judges and gates have to do with the traces.
        people: Annotated rows of the traces' scenes; of all scenes where they have none; None if there are no rows.
        answers: Keeps what agents answer.
        verdicts: Keeps what judges say.
        clients: Ask endpoints for agents and judges.
    """

    traces: list[Trace]
    splits: dict[str, TraceSplit]
    agents: Mapping[str, Agent]
    judges: Mapping[str, Judge]
    gates: Mapping[str, Judge] | None
    cost_ratio: float
    stamps: Stamps
    people: list[AnnotatedRow] | None
    answers: AnswerLog
    verdicts: AnswerLog
    clients: Sequence[ChatClient] = ()
