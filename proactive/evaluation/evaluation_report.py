"""The page report.html of an evaluation: metrics, plots, and every event with its offers and verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.reporting.plots import image, new_axes
from models.reporting.templating import template_environment
from models.reporting.timeline import OUTCOME_NAMES, ShownOffer, ShownStep, ShownTrace, outcomes_of, timelines
from proactive.evaluation.judged_events import JudgedCandidate, JudgedEvent

COLORS = {"tp": "tab:green", "fp": "tab:orange", "tn": "tab:blue", "fn": "tab:red", "undecided": "tab:grey"}
METRICS = ("recall", "precision", "accuracy", "false_alarm", "f1")


def evaluation_report(record: Mapping[str, Any], events: Sequence[JudgedEvent]) -> str:
    """The page as HTML. Text from data and models is escaped.

    Args:
        record: The content of metrics.json.
        events: All judged events.
    """
    by_trace: dict[str, list[JudgedEvent]] = {}
    for event in events:
        by_trace.setdefault(event.trace.name, []).append(event)
    plots = {"Outcomes by trace": _outcome_plot(by_trace)}
    if record["gate"]:
        plots = {"Trade-off of the gate": _gate_plot(record)} | plots
    if "at" in record["figures"]:
        plots["By number of candidates"] = _candidates_plot(record)
    f1 = {name: f"F1 {found['f1']:.3f}" for name, found in record["per_trace"].items()}
    shown = timelines([shown_traces(events)], f1)
    return (
        template_environment()
        .get_template("evaluation_report.html")
        .render(
            record=record,
            rows=_rows(record),
            names=METRICS,
            plots=plots,
            timelines=shown,
            sources=[""],
            outcomes=outcomes_of(shown),
        )
    )


def shown_traces(events: Sequence[JudgedEvent]) -> list[ShownTrace]:
    """The traces of judged events, as pages show them."""
    steps: dict[str, list[ShownStep]] = {}
    traces = {event.trace.name: event.trace for event in events}
    for event in events:
        offers = (_shown(judged, place == event.deciding) for place, judged in enumerate(event.candidates))
        steps.setdefault(event.trace.name, []).append(ShownStep(tuple(offers), event.outcome))
    return [ShownTrace(name, trace.events, tuple(steps[name])) for name, trace in traces.items()]


def _shown(judged: JudgedCandidate, counts: bool) -> ShownOffer:
    return ShownOffer(
        judged.candidate.proposal,
        judged.candidate.parsed,
        judged.verdict.accepted,
        judged.verdict.probability,
        judged.gate_probability,
        bool(judged.held_back),
        judged.verdict.thought or "",
        {title: str(text) for title, text in judged.candidate.notes.items() if text},
        counts,
    )


def _rows(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of the table of metrics, by label."""
    rows = {"this agent": record["figures"]}
    if record["gate"]:
        rows["without gate"] = record["gate"]["without_gate"]
    rows |= record["baselines"]
    rows |= {f"split {name}": split["figures"] for name, split in record["splits"].items()}
    return rows | {f"published: {name}": found for name, found in record["published"].items()}


def _gate_plot(record: Mapping[str, Any]) -> str:
    """F1 and recall against the share of false alarms, over all thresholds of the gate."""
    axes = new_axes("false alarms, share of offers", "")
    curve = sorted(record["gate"]["curve"], key=lambda point: point["threshold"])
    for name, color in (("recall", "tab:blue"), ("f1", "tab:green")):
        axes.plot([point["false_alarm"] for point in curve], [point[name] for point in curve], color=color, label=name)
        points = {
            "ungated": (record["gate"]["without_gate"], "o"),
            f"gate at {record['gate']['threshold']:.2f}": (record["figures"], "s"),
            "always-propose": (record["baselines"].get("always-propose"), "x"),
        }
        for label, (found, marker) in points.items():
            if found:
                label = label if name == "f1" else "_hidden"
                axes.plot(found["false_alarm"], found[name], marker, color=color, label=label)
    axes.set(ylim=(-0.02, 1.02))
    return image(axes)


def _outcome_plot(by_trace: Mapping[str, Sequence[JudgedEvent]]) -> str:
    axes = new_axes("events", "")
    left = [0] * len(by_trace)
    for outcome, word in OUTCOME_NAMES.items():
        counts = [sum(event.outcome == outcome for event in events) for events in by_trace.values()]
        if any(counts):
            axes.barh(list(by_trace), counts, left=left, label=word, color=COLORS[outcome])
            left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlim(right=1.45 * max(left))  # room for the legend
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # the name of a trace is not a formula
    return image(axes)


def _candidates_plot(record: Mapping[str, Any]) -> str:
    axes = new_axes("candidates", "")
    at = record["figures"]["at"]
    for name in METRICS:
        axes.plot([int(k) for k in at], [found[name] for found in at.values()], marker="o", label=name)
    axes.set(ylim=(-0.02, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image(axes)
