"""The record of a prepared evaluation: models, data and settings, checked and typed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.corpus.records import AnnotatedRow, TraceSplit
from datamodules.corpus.traces import Trace
from models.judging.agents import Agent
from models.judging.answer_log import AnswerLog
from models.judging.chat_client import ChatClient
from models.judging.judges import Judge
from models.judging.weights import Exposure

ROLES = ("agent", "judge", "gate")
STAMPS = {Exposure.TRAINED: "trained_on", Exposure.VALIDATED: "validated_on", Exposure.UNKNOWN: "validation_unknown"}


@dataclass(frozen=True)
class Stamps:
    """Marks that all outputs of an evaluation carry: which models trained or validated on the traces.

    Attributes:
        exposures: By role and name of a trace, the exposure of the role's weights to the trace.
        traces_left_out: Names of traces that are skipped because the agent trained on them.
        gate_is_judge: Whether gate and judge have the same weights.
    """

    exposures: Mapping[str, Mapping[str, Exposure]]
    traces_left_out: list[str] = field(default_factory=list)
    gate_is_judge: bool = False

    def record(self) -> dict[str, Any]:
        """The marks as in metrics.json."""
        named = {
            f"{role}_{word}": [name for name, exposure in self.exposures.get(role, {}).items() if exposure == kind]
            for role in ROLES
            for kind, word in STAMPS.items()
        }
        return {**named, "traces_left_out": self.traces_left_out, "gate_is_judge": self.gate_is_judge}

    @property
    def suffix(self) -> str:
        """The marks as part of a file name, for files whose layout has no field for them."""
        found = {exposure for exposures in self.exposures.values() for exposure in exposures.values()}
        marks = [f"-{word.replace('_', '-')}" for kind, word in STAMPS.items() if kind in found]
        marks = ["-contaminated" if mark == "-trained-on" else mark for mark in marks]
        return "".join(marks) + ("-gate-is-judge" if self.gate_is_judge else "")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, ready to be carried out.

    Attributes:
        traces: The traces to answer.
        splits: The traces of each split.
        agents: The agent of each trace, by name of the trace.
        judges: The judge of each trace.
        gates: The gate of each trace; None without a gate.
        cost_ratio: Cost of a false alarm relative to a missed need.
        stamps: Whether agents, judges and gates trained or validated on the traces.
        people: Annotated rows of the traces' scenes, or of all scenes if these have none; None without rows.
        answers: Log of the agents' answers.
        verdicts: Log of the judges' verdicts.
        clients: Clients of endpoints.
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
