"""The pages report.html of simulated sessions and of written scenes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.reporting.templating import template_environment
from models.reporting.timeline import ShownOffer, ShownStep, ShownTrace, outcome, outcomes_of, timelines
from proactive.simulation.scenes import SceneDescription
from proactive.simulation.simulated_traces import Attempt, Step

if TYPE_CHECKING:
    from jinja2 import Template

SHOWN = 12  # traces on the page


def report(record: Mapping[str, Any], traces: Mapping[str, list[Step]]) -> str:
    """Return the page as HTML. Text from data and models is escaped.

    Args:
        record: The content of summary.json.
        traces: The traces by name. The first `SHOWN` are shown.
    """
    shown = timelines([[_shown(name, steps) for name, steps in list(traces.items())[:SHOWN]]])
    return _template("simulation_report.html").render(
        record=record, timelines=shown, traces=len(traces), sources=[""], outcomes=outcomes_of(shown)
    )


def scenes_report(record: Mapping[str, Any], scenes: Mapping[str, SceneDescription]) -> str:
    """Return the page of written scenes as HTML. Text from models is escaped.

    Args:
        record: The content of summary.json.
        scenes: The scenes by name.
    """
    return _template("scenes_report.html").render(record=record, scenes=scenes)


def _template(name: str) -> "Template":
    return template_environment(Path(__file__).with_name("templates")).get_template(name)


def _shown(name: str, steps: list[Step]) -> ShownTrace:
    return ShownTrace(name, tuple(step.event for step in steps), tuple(map(_shown_step, steps)))


def _shown_step(step: Step) -> ShownStep:
    last = len(step.attempts) - 1
    offers = tuple(_shown_offer(attempt, place == last) for place, attempt in enumerate(step.attempts))
    decided = [outcome(attempt.proposal is not None, attempt.accepted) for attempt in step.attempts]
    return ShownStep(offers, decided[-1] if decided else "undecided")


def _shown_offer(attempt: Attempt, counts: bool) -> ShownOffer:
    notes = {"Purpose": attempt.purpose, "Thoughts": attempt.thoughts, "Response": attempt.response}
    shown = {title: text for title, text in notes.items() if text}
    return ShownOffer(
        attempt.proposal,
        verdict=attempt.accepted,
        probability=attempt.probability,
        thought=attempt.reason,
        notes=shown,
        counts=counts,
    )
