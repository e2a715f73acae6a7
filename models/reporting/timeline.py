"""Timelines: the events of a trace, with the offers of one or several sources and the verdicts on them, for people.

Reports of evaluations and the trace reader show timelines with one template. An evaluation stores its own as JSON.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from datamodules.corpus.event_times import Moment, moments
from datamodules.corpus.records import Event

TIMELINE_FILE = "timeline.json"
OUTCOME_NAMES = {
    "tp": "accepted offer",
    "fp": "false alarm",
    "tn": "right silence",
    "fn": "missed need",
    "undecided": "no verdict",
}


@dataclass(frozen=True)
class ShownOffer:
    """One candidate, as it is shown. `text` is None for silence; `verdict` is None if there is no verdict."""

    text: str | None
    parsed: bool = True
    verdict: bool | None = None
    probability: float | None = None  # P(accepted)
    gate: float | None = None  # the gate's P(accepted)
    held_back: bool = False
    thought: str = ""  # the judge's
    notes: Mapping[str, str] = field(default_factory=dict)  # the agent's
    counts: bool = True  # whether it decides the outcome

    @property
    def asides(self) -> dict[str, str]:
        """The judge's thought and the agent's notes, by title."""
        return {**({"Judge": self.thought} if self.thought else {}), **self.notes}


@dataclass(frozen=True)
class ShownStep:
    """The offers of one source after an event, and their outcome, a key of `OUTCOME_NAMES`."""

    offers: tuple[ShownOffer, ...]
    outcome: str

    @property
    def decision(self) -> str:
        """The text by which sources are compared: the outcome, or, without a verdict, whether there is an offer."""
        silent = all(offer.text is None or offer.held_back for offer in self.offers)
        return self.outcome if self.outcome != "undecided" else f"no verdict, {'silent' if silent else 'an offer'}"


@dataclass(frozen=True)
class ShownTrace:
    """A trace as one source answered it; `steps` has one entry for each event."""

    name: str
    events: tuple[Event, ...]
    steps: tuple[ShownStep, ...]


@dataclass(frozen=True)
class Line:
    """An event of a timeline with a step for each source; None is a source that lacks the trace."""

    number: int  # from 1
    moment: Moment
    steps: tuple[ShownStep | None, ...]

    @property
    def outcomes(self) -> list[str]:
        return list(dict.fromkeys(step.outcome for step in self.steps if step))

    @property
    def differs(self) -> bool:
        return len({step.decision for step in self.steps if step}) > 1

    @property
    def words(self) -> str:
        """The text that a search looks through, in lower case."""
        said = [self.moment.event]
        for offer in (offer for step in self.steps if step for offer in step.offers):
            said += [offer.text or "", *offer.asides.values()]
        return "\n".join(said).lower()


@dataclass(frozen=True)
class Timeline:
    """One session, with its sources side by side. The link to an event ends with `anchor`-`number`."""

    name: str
    anchor: str
    lines: tuple[Line, ...]
    note: str = ""


def timelines(sources: Sequence[Sequence[ShownTrace]], notes: Mapping[str, str] | None = None) -> list[Timeline]:
    """Put sources side by side: traces with the same name and the same events become one timeline.

    Args:
        sources: The traces of each source.
        notes: A note on each trace, by name.
    """
    found: dict[tuple[str, tuple[Event, ...]], list[ShownTrace | None]] = {}
    for place, traces in enumerate(sources):
        for trace in traces:
            found.setdefault((trace.name, trace.events), [None] * len(sources))[place] = trace
    made: list[Timeline] = []
    for (name, events), shown in found.items():
        anchor = re.sub(r"[^\w.-]", "_", name)
        if any(other.anchor == anchor for other in made):  # another excerpt of the session
            anchor = f"{anchor}.{len(made)}"
        columns = zip_longest(*(trace.steps if trace else () for trace in shown))
        numbered = enumerate(zip(moments(events), columns, strict=True), 1)
        lines = tuple(Line(number, moment, steps) for number, (moment, steps) in numbered)
        made.append(Timeline(name, anchor, lines, (notes or {}).get(name, "")))
    return made


def outcomes_of(shown: Sequence[Timeline]) -> dict[str, str]:
    """The outcomes that occur, with their names."""
    found = {outcome for one in shown for line in one.lines for outcome in line.outcomes}
    return {outcome: name for outcome, name in OUTCOME_NAMES.items() if outcome in found}


def outcome(proposed: bool, accepted: bool | None) -> str:
    """The key in `OUTCOME_NAMES` of an offer or of silence, from the verdict on it, or None without a verdict."""
    if accepted is None:
        return "undecided"
    return ("tp" if accepted else "fp") if proposed else ("tn" if accepted else "fn")


class ShownTraces(BaseModel):
    """The traces of an evaluation, as its folder stores them."""

    model_config = ConfigDict(extra="forbid")
    hint: ClassVar[str] = "Give a folder that `python -m proactive.evaluate agent` wrote."

    notes: tuple[str, ...]  # what a reader of the outcomes must know
    traces: tuple[ShownTrace, ...]
