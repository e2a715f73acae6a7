"""Notes on an evaluation of an agent: what a reader must know about its metrics."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.learning.calibration import DECISION
from models.reporting.run_record import intervals_note

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


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader must know about an agent's metrics, one sentence each. Warnings start with words in capitals."""
    return [
        *_training_notes(record),
        *_judge_notes(record),
        *_acceptance_notes(record["acceptance"]),
        *_scope_notes(record),
        *_answer_notes(record),
    ]


def _training_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Which models were trained or validated on the traces."""
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
    """Which traces the metrics and their intervals are computed from."""
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


def _rates(counts: Mapping[str, Mapping[str, int]]) -> str:
    return " and ".join(
        f"{of_kind['accepted'] / max(of_kind['judged'], 1):.0%} of {of_kind['judged']} {kind}"
        for kind, of_kind in counts.items()
    )
