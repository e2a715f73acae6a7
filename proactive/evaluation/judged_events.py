"""The result of an evaluation of an agent: judged events, and metrics over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.corpus.records import AnnotatedRow, TraceSplit
from datamodules.corpus.sources import PUBLISHED_TRACES_DIGESTS
from datamodules.corpus.traces import Answers, Candidate, ProposalKey, Trace, traces_digest
from models.judging.gate_curve import Gated
from models.judging.judges import Verdict
from models.learning.metrics import (
    BOOTSTRAP_RESAMPLES,
    NO_VERDICT,
    AgentMetrics,
    deciding_candidate,
)
from models.learning.published_metrics import PUBLISHED_AGENT_ROWS
from models.reporting.run_record import versions
from models.reporting.timeline import outcome

Verdicts = Mapping[ProposalKey, Verdict]


@dataclass(frozen=True)
class JudgedCandidate:
    """A candidate with its verdict.

    Attributes:
        candidate: The candidate.
        verdict: The judge's verdict on it, or on null if the gate held it back.
        gate_probability: The gate's P(accepted); None if no gate scored it.
        held_back: Whether the gate held it back; None if no gate scored it.
    """

    candidate: Candidate
    verdict: Verdict
    gate_probability: float | None = None
    held_back: bool | None = None

    @property
    def proposed(self) -> bool:
        return self.candidate.proposal is not None and not self.held_back

    @property
    def accepted(self) -> int:
        """1, 0 or `NO_VERDICT`."""
        return NO_VERDICT if self.verdict.accepted is None else int(self.verdict.accepted)


@dataclass(frozen=True)
class JudgedEvent:
    """An event with its candidates. `deciding` is the index of the candidate that counts in metrics."""

    trace: Trace
    step: int
    candidates: tuple[JudgedCandidate, ...]
    deciding: int

    @property
    def outcome(self) -> str:
        """tp, fp, tn, fn, or undecided."""
        candidate = self.candidates[self.deciding]
        return outcome(candidate.proposed, candidate.verdict.accepted)


def judge_events(
    traces: Sequence[Trace],
    answers: Answers,
    verdicts: Verdicts,
    gate: Verdicts | None = None,
    threshold: float = 0.0,
) -> list[JudgedEvent]:
    """Combine answers and verdicts for each event.

    Args:
        traces: The traces, in the order of the result.
        answers: The agent's answers.
        verdicts: The judge's verdicts on all candidates; with a gate also on null after each event.
        gate: The gate's verdicts on all offers; None without a gate.
        threshold: The gate holds back offers with a lower P(accepted), 0 to 1.
    """
    events = []
    for trace in traces:
        for step, candidates in enumerate(answers[trace.name]):
            judged = []
            for candidate in candidates:
                key = ProposalKey(trace.name, step, candidate.proposal)
                probability, held_back = None, None
                if gate is not None and candidate.proposal is not None:
                    probability = gate[key].probability
                    held_back = probability is not None and probability < threshold
                verdict = verdicts[key._replace(proposal=None) if held_back else key]
                judged.append(JudgedCandidate(candidate, verdict, probability, held_back))
            deciding = deciding_candidate(torch.tensor([[one.accepted for one in judged]]))
            events.append(JudgedEvent(trace, step, tuple(judged), int(deciding)))
    return events


def metrics_of(events: Sequence[JudgedEvent], bootstrap: int = BOOTSTRAP_RESAMPLES) -> dict[str, Any]:
    """Metrics of an agent on some events: over all candidates, and, in `at`, over the first k of several candidates."""
    metrics = AgentMetrics(bootstrap)
    metrics.update(*_tensors(events))
    values = {name: float(value) for name, value in metrics.compute().items()}
    found: dict[str, Any] = {name: value for name, value in values.items() if "@" not in name}
    found["parse_failures"] = sum(not j.candidate.parsed for event in events for j in event.candidates)
    most_candidates = max(len(event.candidates) for event in events)
    if most_candidates > 1:
        found["at"] = {
            str(k): {name: values[f"{name}@{k}"] for name in found if f"{name}@{k}" in values}
            for k in range(1, most_candidates + 1)
        }
    return found


def gated(events: Sequence[JudgedEvent], verdicts: Verdicts) -> Gated:
    """The candidates and verdicts that a curve over all thresholds of the gate is computed from.

    Args:
        events: The events, judged with a threshold of 0.
        verdicts: The judge's verdicts, also on null after each event.
    """
    proposed_NK, accepted_NK, trace_N = _tensors(events)
    null = [verdicts[ProposalKey(event.trace.name, event.step, None)].accepted for event in events]
    null_N = torch.tensor([NO_VERDICT if accepted is None else int(accepted) for accepted in null])
    probability_NK = torch.zeros(proposed_NK.shape, dtype=torch.float64)
    for row, event in enumerate(events):
        for column, candidate in enumerate(event.candidates):
            probability_NK[row, column] = candidate.gate_probability or 0.0
    return Gated(proposed_NK, accepted_NK, probability_NK, null_N, trace_N)


def evaluation_record(events: Sequence[JudgedEvent], splits: Mapping[str, TraceSplit]) -> dict[str, Any]:
    """Metrics of an agent over all traces, by split and by trace. Splits with a missing trace are skipped.

    Args:
        events: All judged events.
        splits: The traces of each split.
    """
    by_trace: dict[str, list[JudgedEvent]] = {}
    for event in events:
        by_trace.setdefault(event.trace.name, []).append(event)
    traces = list({event.trace.name: event.trace for event in events}.values())
    complete = {name: split for name, split in splits.items() if split.files and set(split.files) <= set(by_trace)}
    return {
        "task": "agent",
        "figures": metrics_of(events),
        "splits": {
            name: {"theme": split.theme, "traces": len(split.files)}
            | {"figures": metrics_of([event for file in split.files for event in by_trace[file]])}
            for name, split in complete.items()
        },
        "splits_left_out": sorted(set(splits) - set(complete)),
        "per_trace": {name: metrics_of(mine, bootstrap=0) for name, mine in by_trace.items()},
        "published": PUBLISHED_AGENT_ROWS if traces_digest(traces) in PUBLISHED_TRACES_DIGESTS else {},
        "versions": versions(),
    }


def acceptance(verdicts: Verdicts, people: Sequence[AnnotatedRow] | None) -> dict[str, Any]:
    """How often judge and people accept offers and silences.

    Args:
        verdicts: All verdicts. Undecided ones are not counted.
        people: Annotated rows to compare with; None without rows.
    """
    said = [(offer.proposal is None, verdict.accepted) for offer, verdict in verdicts.items()]
    judge = _acceptance([(silent, accepted) for silent, accepted in said if accepted is not None])
    rows = people and _acceptance([(row.proposal is None, row.accepted) for row in people])
    return {"judge": judge, "people": rows or None}


def _acceptance(judged: Sequence[tuple[bool, bool]]) -> dict[str, dict[str, int]]:
    """Count judged and accepted offers and silences, from pairs of (is silence, is accepted)."""
    kinds = {"offers": False, "silences": True}
    verdicts = {name: [accepted for silent, accepted in judged if silent is kind] for name, kind in kinds.items()}
    return {name: {"judged": len(of_kind), "accepted": sum(of_kind)} for name, of_kind in verdicts.items()}


def _tensors(events: Sequence[JudgedEvent]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `AgentMetrics`: proposed and accepted (N, K) int64, trace (N,) int64. Missing candidates are null."""
    most_candidates = max(len(event.candidates) for event in events)
    proposed_NK = torch.zeros((len(events), most_candidates), dtype=torch.int64)
    accepted_NK = torch.full((len(events), most_candidates), NO_VERDICT)
    names = {name: number for number, name in enumerate(dict.fromkeys(event.trace.name for event in events))}
    for row, event in enumerate(events):
        for column, candidate in enumerate(event.candidates):
            proposed_NK[row, column], accepted_NK[row, column] = int(candidate.proposed), candidate.accepted
    return proposed_NK, accepted_NK, torch.tensor([names[event.trace.name] for event in events])
