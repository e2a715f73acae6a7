"""The result of an evaluation of an agent: judged events, metrics, notes, published layouts."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.corpus.records import AnnotatedRow, TraceSplit
from datamodules.corpus.sources import PUBLISHED_TRACES_DIGESTS
from datamodules.corpus.traces import Answers, Candidate, Offer, Trace, judged_steps, traces_digest
from datamodules.escaping import to_cell
from models.judging.gate_curve import Gated
from models.judging.judges import Verdict
from models.learning.calibration import DECISION
from models.learning.metrics import (
    BOOTSTRAP_RESAMPLES,
    NO_VERDICT,
    PUBLISHED_AGENT_ROWS,
    AgentMetrics,
    deciding_candidate,
)
from models.reporting.run_record import intervals_note, versions
from models.reporting.timeline import outcome

PUBLISHED_COLUMNS = {
    "Recall": "recall",
    "Precision": "precision",
    "Accuracy": "accuracy",
    "False-Alarm": "false_alarm",
    "F1-Score": "f1",
    "Accept Rate": "accept_rate",
    "Total Events": "events",
}
Verdicts = Mapping[Offer, Verdict]
TRAINING_NOTES = {
    "trained_on": "CONTAMINATED: the {who} was trained on {traces}",
    "validated_on": "VALIDATED ON: {traces} chose the best weights of the {who} and calibrated them",
    "validation_unknown": (
        "VALIDATION UNKNOWN: an older checkpoint of the {who} does not say whether {traces} chose its best weights"
    ),
}
ONE_SIDED_EFFECT = {
    ("silences", "ACCEPTED"): "no need can count as missed",
    ("silences", "REJECTED"): "each counts as a missed need",
    ("offers", "ACCEPTED"): "none can count as a false alarm",
    ("offers", "REJECTED"): "each counts as a false alarm",
}


@dataclass(frozen=True)
class Judgment:
    """A candidate with its verdict.

    `held_back` is None for a candidate that no gate scored. The verdict of a held-back candidate is that on null.
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
    """An event with its candidates. `deciding` is the index of the candidate that counts."""

    trace: Trace
    step: int
    judgments: tuple[Judgment, ...]
    deciding: int

    @property
    def outcome(self) -> str:
        """tp, fp, tn, fn, or undecided."""
        judgment = self.judgments[self.deciding]
        return outcome(judgment.proposed, judgment.verdict.accepted)


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
            judgments = []
            for candidate in candidates:
                offer = Offer(trace.name, step, candidate.proposal)
                probability, held = None, None
                if gate is not None and candidate.proposal is not None:
                    probability = gate[offer].probability
                    held = probability is not None and probability < threshold
                verdict = verdicts[offer._replace(proposal=None) if held else offer]
                judgments.append(Judgment(candidate, verdict, probability, held))
            deciding = deciding_candidate(torch.tensor([[judgment.accepted for judgment in judgments]]))
            events.append(JudgedEvent(trace, step, tuple(judgments), int(deciding)))
    return events


def figures(events: Sequence[JudgedEvent], bootstrap: int = BOOTSTRAP_RESAMPLES) -> dict[str, Any]:
    """Metrics over all candidates, and under `at` over the first k of several candidates."""
    metrics = AgentMetrics(bootstrap)
    metrics.update(*_tensors(events))
    values = {name: float(value) for name, value in metrics.compute().items()}
    found: dict[str, Any] = {name: value for name, value in values.items() if "@" not in name}
    found["parse_failures"] = sum(not j.candidate.parsed for event in events for j in event.judgments)
    most_candidates = max(len(event.judgments) for event in events)
    if most_candidates > 1:
        found["at"] = {
            str(k): {name: values[f"{name}@{k}"] for name in found if f"{name}@{k}" in values}
            for k in range(1, most_candidates + 1)
        }
    return found


def gated(events: Sequence[JudgedEvent], verdicts: Verdicts) -> Gated:
    """The inputs of a curve over all thresholds of the gate.

    Args:
        events: The events, judged with a threshold of 0.
        verdicts: The judge's verdicts, also on null after each event.
    """
    proposed_NK, accepted_NK, trace_N = _tensors(events)
    null = [verdicts[Offer(event.trace.name, event.step, None)].accepted for event in events]
    null_N = torch.tensor([NO_VERDICT if accepted is None else int(accepted) for accepted in null])
    probability_NK = torch.zeros(proposed_NK.shape, dtype=torch.float64)
    for row, event in enumerate(events):
        for column, judgment in enumerate(event.judgments):
            probability_NK[row, column] = judgment.gate_probability or 0.0
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
        "figures": figures(events),
        "splits": {
            name: {"theme": split.theme, "traces": len(split.files)}
            | {"figures": figures([event for file in split.files for event in by_trace[file]])}
            for name, split in complete.items()
        },
        "splits_left_out": sorted(set(splits) - set(complete)),
        "per_trace": {name: figures(mine, bootstrap=0) for name, mine in by_trace.items()},
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


def _rates(counts: Mapping[str, Mapping[str, int]]) -> str:
    return " and ".join(
        f"{of_kind['accepted'] / max(of_kind['judged'], 1):.0%} of {of_kind['judged']} {kind}"
        for kind, of_kind in counts.items()
    )


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about an agent's metrics, a sentence each. Warnings start with capitals."""
    return [
        *_training_notes(record),
        *_judge_notes(record),
        *_acceptance_notes(record["acceptance"]),
        *_scope_notes(record),
        *_answer_notes(record),
    ]


def _training_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Which models trained or validated on the traces."""
    for stamp, sentence in TRAINING_NOTES.items():
        for who in ("agent", "judge", "gate"):
            if names := record[f"{who}_{stamp}"]:
                yield sentence.format(who=who, traces=f"{len(names)} of the {len(record['per_trace'])} traces")


def _judge_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """What limits the judge's and the gate's verdicts."""
    if record["gate_is_judge"]:
        yield "THE GATE IS THE JUDGE: it holds back what it would reject itself"
    for who in ("judge", "gate"):
        for source, calibration in ((record[who] or {}).get("calibration") or {}).items():
            if calibration is None:
                yield f"NOT CALIBRATED: the {who} {source}; no validation ran after a training step"
    if record["judge"]["judge"] == "reward classifier":
        yield f"the judge accepts above {DECISION:g}, calibrated"


def _acceptance_notes(acceptance: Mapping[str, Any]) -> Iterator[str]:
    """Whether the judge accepts or rejects everything, and how often judge and people accept."""
    judged, people = acceptance["judge"], acceptance["people"]
    for kind, counts in judged.items():
        if counts["judged"] and counts["accepted"] in (0, counts["judged"]):
            how = "ACCEPTED" if counts["accepted"] else "REJECTED"
            effect = ONE_SIDED_EFFECT[kind, how]
            yield f"ALL {kind.upper()} ARE {how}: {counts['judged']} were judged, and {effect}"
    yield f"acceptance: the judge {_rates(judged)}; people {_rates(people) if people else 'are not known'}"


def _scope_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Which traces the metrics and intervals are of."""
    traces = int(record["figures"]["traces"])
    if traces > 1:
        yield intervals_note(traces, "traces")
    if record["traces_left_out"]:
        yield f"skipped, because the agent was trained on them: {', '.join(record['traces_left_out'])}"


def _answer_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Requests and truncated replies, held-back offers, missing baselines, and answers or events without a result."""
    metrics = record["figures"]
    for who, usage in record["usage"].items():
        cost = f", cost {usage['cost']:.4g}" if "cost" in usage else ""
        unreported = f"; {usage['unreported']} requests without reported tokens" if usage["unreported"] else ""
        yield (
            f"{who}: {usage['requests']} requests, {usage['prompt_tokens']:,} tokens in, "
            f"{usage['completion_tokens']:,} out{cost}{unreported}"
        )
    for who, reasons in record["unfinished"].items():
        if reasons:
            counts = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
            note = f"incomplete replies of the {who}, which were not parsed: {counts}"
            if "length" in reasons:
                note += (
                    "; --agent.answers.max_new_tokens, or max_tokens in --agent.extra or --judge.extra, gives more room"
                )
            yield note
    if gate := record["gate"]:
        yield (
            f"gate: {gate['held_back']} proposals below P(accepted) {gate['threshold']:.3f} held back "
            f"(cost ratio {gate['cost_ratio']:g})"
        )
    if record["judge"]["judge"] == "endpoint":
        yield "the judge's training data are not known"
    if not record["baselines"]:
        recorded = record["judge"]["judge"] == "recorded"
        reason = "recorded judgments do not cover them" if recorded else "else run one with --agent.baseline"
        yield f"only a reward classifier as judge also judges the baselines; {reason}"
    if metrics["parse_failures"]:
        yield f"{metrics['parse_failures']} answers could not be parsed and count as null"
    if metrics["undecided"]:
        yield f"{int(metrics['undecided'])} events have no verdict and count in no metric"
    if record["splits_left_out"]:
        yield f"splits with missing traces: {', '.join(record['splits_left_out'])}"


def figures_csv(record: Mapping[str, Any]) -> str:
    """Metrics of each split in the layout of the published scoring."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # with \r\n line ends, so that the writer quotes a cell that contains either
    writer.writerow(["Category", *PUBLISHED_COLUMNS])
    for name, split in record["splits"].items():
        values = [split["figures"][figure] for figure in PUBLISHED_COLUMNS.values()]
        writer.writerow([to_cell(name), *values[:-1], int(values[-1])])
    return text.getvalue()


def judged_files(events: Sequence[JudgedEvent]) -> dict[str, list[dict[str, Any]]]:
    """Each trace in the published judged layout, by name."""
    decided: dict[str, list[tuple[Candidate, bool | None]]] = {}
    traces = {event.trace.name: event.trace for event in events}
    for event in events:
        judgment = event.judgments[event.deciding]
        candidate = judgment.candidate if judgment.proposed else Candidate(None, None, judgment.candidate.notes)
        decided.setdefault(event.trace.name, []).append((candidate, judgment.verdict.accepted))
    return {name: judged_steps(traces[name], steps) for name, steps in decided.items()}


def _tensors(events: Sequence[JudgedEvent]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `AgentMetrics`: proposed and accepted (N, K) int64, trace (N,) int64. Missing candidates are null."""
    most_candidates = max(len(event.judgments) for event in events)
    proposed_NK = torch.zeros((len(events), most_candidates), dtype=torch.int64)
    accepted_NK = torch.full((len(events), most_candidates), NO_VERDICT)
    names = {name: number for number, name in enumerate(dict.fromkeys(event.trace.name for event in events))}
    for row, event in enumerate(events):
        for column, judgment in enumerate(event.judgments):
            proposed_NK[row, column], accepted_NK[row, column] = int(judgment.proposed), judgment.accepted
    return proposed_NK, accepted_NK, torch.tensor([names[event.trace.name] for event in events])
