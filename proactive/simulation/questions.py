"""What roles are asked, and the records that their answers have to fit.

Roles are the environment, the user, the assistant and the judge. A role keeps nothing between questions: all that it
needs to know stands in the question. So a resumed simulation asks again nothing that the log answers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from datamodules.corpus.records import Proposal, Text, Unicode
from datamodules.prompting.chat_prompts import Schema
from datamodules.ranges import FINITE
from proactive.simulation.scenes import Trial

RoleName = Literal["environment", "user", "assistant", "judge"]
ROLES: tuple[RoleName, ...] = ("environment", "user", "assistant", "judge")
Verdict = Literal["accepted", "rejected", "ignored"]
MOST_EVENTS = 8  # that one act or one accepted offer may lead to
MOST_ENTITIES = 100
LONGEST = 2000  # characters of a text


def _not_long(text: str | None) -> str | None:
    if text is not None and len(text) > LONGEST:
        raise ValueError(f"expected at most {LONGEST} characters, got {len(text)}")
    return text


Short = Annotated[Text, AfterValidator(_not_long)]
Note = Annotated[Unicode, AfterValidator(_not_long)]
Seconds = Annotated[float, Ge(0.001), Le(7 * 86_400), FINITE]  # between two events


class Fits(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/simulate.md"


class EntityState(Fits):
    """The state of an entity. One that the scene does not know yet is only created if `new` says so."""

    entity: Short
    state: Short
    new: bool


class Setup(Fits):
    """The environment's answer before the first event: the states of entities."""

    entities: list[EntityState] = Field(max_length=MOST_ENTITIES)


class Asked(Fits):
    """A user's question about the surroundings."""

    question: Short


class Told(Fits):
    """The environment's answer to it."""

    answer: Short


class Act(Fits):
    """What the user does next, in which hidden state, and whether that reaches the goal."""

    state: Literal["stuck", "exploring", "flowing", "away"]
    act: Short
    goal_reached: bool


class NewEvent(Fits):
    """An event, and how many seconds it comes after the one before."""

    seconds: Seconds
    event: Short


class Events(Fits):
    """What comes of an act, or of an offer that the assistant carries out."""

    events: list[NewEvent] = Field(min_length=1, max_length=MOST_EVENTS)
    entities: list[EntityState] = Field(max_length=MOST_ENTITIES)


class Proposed(Fits):
    """The assistant's answer after an event; a proposal of null is silence."""

    purpose: Note
    thoughts: Note
    proposal: Annotated[Proposal, AfterValidator(_not_long)]
    response: Note


class Judged(Fits):
    """What is thought of a proposal, and why."""

    judgment: Verdict
    reason: Note


Answer = TypeVar("Answer", bound=Fits)


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A question.

    Attributes:
        role: Who is asked.
        kind: What for, in a word.
        facts: All that the role needs to know, as JSON has it.
        answer: What its answer has to fit.
    """

    role: RoleName
    kind: str
    facts: dict[str, Any]
    answer: type[Answer]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the question."""
        content = [self.role, self.kind, self.facts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def schema(self) -> Schema:
        """The JSON schema of its answer."""
        schema = self.answer.model_json_schema()
        return Schema(self.kind, schema["properties"], schema.get("$defs", {}))

    def record(self) -> dict[str, Any]:
        """The question for a log: of the history, only how long it is, for earlier answers hold it."""
        short = {name: len(value) if name == "history" else value for name, value in self.facts.items()}
        return {"role": self.role, "kind": self.kind, "question": short}


class Refused(NamedTuple):
    """An answer that does not fit, and why."""

    text: str
    objection: str


class Role(Protocol):
    """Answers questions. A new kind of role is a new class with these methods."""

    def describe(self) -> dict[str, Any]:
        """Return all that determines its answers, in plain types."""
        ...

    async def reply(self, question: Question[Any], trial: Trial, refused: Sequence[Refused]) -> str:
        """Return the answer as JSON, from the log if it holds it; a new answer is added to the log.

        Args:
            question: The question.
            trial: The session that it belongs to.
            refused: Its answers to the question so far, none of which fits.
        """
        ...


Players = dict[RoleName, Role]
