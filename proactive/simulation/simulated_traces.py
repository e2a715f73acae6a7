"""Simulated traces in the published layout. Each step lists all proposals that the assistant made after its event."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from datamodules.corpus.json_records import read_json_list, validate
from datamodules.corpus.records import Event, Proposal, PublishedStep, Unicode
from datamodules.files.writing import write_atomically

TRACES = "traces"


class Attempt(BaseModel):
    """A proposal and its judgment; `probability` is P(accepted), from judges that compute it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    purpose: Unicode
    thoughts: Unicode
    proposal: Proposal
    response: Unicode
    judgment: Literal["accepted", "rejected", "ignored"]
    reason: Unicode
    probability: float | None = None

    @property
    def accepted(self) -> bool | None:
        """Whether the proposal was accepted; None if it was ignored."""
        return None if self.judgment == "ignored" else self.judgment == "accepted"


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Information(BaseModel):
    """The fields of a simulated step for which the published layout has no place of its own."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    source: Literal["user", "assistant"]
    state: Unicode
    attempts: Annotated[tuple[Attempt, ...], BeforeValidator(_tuple)]


@dataclass(frozen=True)
class Step:
    """An event and the proposals after it.

    Attributes:
        event: The event.
        source: Who caused it: user or assistant.
        state: The user's hidden state.
        attempts: The assistant's proposals after the event, in order. The last one counts.
        task_status: Whether the user has reached the goal.
    """

    event: Event
    source: str
    state: str
    attempts: tuple[Attempt, ...] = ()
    task_status: bool = False

    def with_attempt(self, attempt: Attempt) -> "Step":
        """Return the step with one more attempt."""
        return replace(self, attempts=(*self.attempts, attempt))

    def with_goal_reached(self) -> "Step":
        """Return the step as one at which the user reaches the goal."""
        return replace(self, task_status=True)

    def published(self) -> dict[str, Any]:
        """Return the step in the published layout. Its field other_infomation contains what the others lack."""
        last = self.attempts[-1:]
        return {
            "observation": self.event.model_dump(),
            "agent_response": [attempt.proposal for attempt in last],
            "task_status": self.task_status,
            "judgement": [attempt.accepted for attempt in last if attempt.accepted is not None],
            "other_infomation": {
                "source": self.source,
                "state": self.state,
                "attempts": [attempt.model_dump() for attempt in self.attempts],
            },
        }


def write_trace(path: Path, steps: Sequence[Step]) -> None:
    """Write a trace."""
    write_atomically(path, json.dumps([step.published() for step in steps], ensure_ascii=False, indent=1) + "\n")


def read_simulated(folder: Path) -> dict[str, list[Step]]:
    """Return the traces of a simulation's folder, by name.

    Raises:
        UserError: A trace is invalid.
    """
    return {path.stem: _read(path) for path in sorted((folder / TRACES).glob("*.json"))}


def _read(path: Path) -> list[Step]:
    steps = []
    for number, step in enumerate(read_json_list(path, PublishedStep)):
        found = validate(step.other_information, _Information, f"{path}, index {number}, field other_infomation")
        steps.append(Step(step.observation, found.source, found.state, found.attempts, step.task_status))
    return steps
