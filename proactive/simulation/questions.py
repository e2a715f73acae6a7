"""Questions to roles, and the schemas of their answers.

Each question contains everything that its answer depends on, so a resumed simulation can take answers from the log. A
role may keep something between questions, such as a KV cache, but only to save time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from datamodules.corpus.records import Proposal, Text, Unicode
from datamodules.escaping import shortened
from datamodules.prompting.chat_prompts import Schema
from datamodules.ranges import FINITE
from proactive.simulation.scenes import SimulatedSession
from proactive.simulation.work_items import RoleName, WorkItem, digest

Judgment = Literal["accepted", "rejected", "ignored"]
MAX_EVENTS = 8  # after one act or one accepted offer
MAX_CHANGES = 10  # of entities, after one act or one accepted offer
MAX_ENTITIES = 100
MAX_EXAMPLES = 50  # operations or example events of one written scene
MAX_LENGTH = 2000  # characters of one text in an answer
EARLIER_ANSWERS = ("history", "rejected")  # facts that consist of earlier answers


def _not_long(text: str | None) -> str | None:
    if text is not None and len(text) > MAX_LENGTH:
        raise ValueError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    return text


def _distinct(texts: list[str]) -> list[str]:
    if repeated := [text for place, text in enumerate(texts) if text in texts[:place]]:
        raise ValueError(f"expected different texts, got {shortened(repeated[0], 100)} twice")
    return texts


Short = Annotated[Text, AfterValidator(_not_long)]
Note = Annotated[Unicode, AfterValidator(_not_long)]
Seconds = Annotated[float, Ge(0.001), Le(7 * 86_400), FINITE]  # between two events


class AnswerPart(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/simulate.md"


class EntityState(AnswerPart):
    """The state of an entity. An entity that does not exist yet is created only if `new` is true."""

    entity: Short
    state: Note
    new: bool


class SetupAnswer(AnswerPart):
    """The environment's states of the entities before the first event."""

    entities: list[EntityState] = Field(max_length=MAX_ENTITIES)


class UserQuestion(AnswerPart):
    """The user's question about the surroundings."""

    question: Short


class EnvironmentAnswer(AnswerPart):
    """The environment's answer to the user's question."""

    answer: Short


class ActAnswer(AnswerPart):
    """The user's next act, their hidden state, and whether the act reaches the goal."""

    state: Literal["stuck", "exploring", "flowing", "away"]
    act: Short
    goal_reached: bool


class NewEvent(AnswerPart):
    """An event, and the seconds since the event before it."""

    seconds: Seconds
    event: Short


class EventsAnswer(AnswerPart):
    """The events that follow an act or an accepted offer."""

    events: list[NewEvent] = Field(min_length=1, max_length=MAX_EVENTS)
    entities: list[EntityState] = Field(max_length=MAX_CHANGES)


class AssistantAnswer(AnswerPart):
    """The assistant's answer after an event. A proposal of null is silence."""

    purpose: Note
    thoughts: Note
    proposal: Annotated[Proposal, AfterValidator(_not_long)]
    response: Note


class JudgeAnswer(AnswerPart):
    """The judgment on a proposal, and the reason. `probability` is P(accepted), from judges that compute it."""

    judgment: Judgment
    reason: Note
    probability: Annotated[float, Ge(0), Le(1)] | None = None


Examples = Annotated[list[Short], Field(max_length=MAX_EXAMPLES), AfterValidator(_distinct)]


class SceneEnvironment(AnswerPart):
    """The environment of a written scene."""

    description: Short
    entities: Annotated[list[Short], AfterValidator(_distinct)] = Field(min_length=1, max_length=MAX_ENTITIES)
    agent_ops: Examples
    events_example: Examples
    theme: Short


class SceneUser(AnswerPart):
    """The user of a written scene."""

    description: Short
    goal: Short


class SceneAnswer(AnswerPart):
    """The writer's scene."""

    environment: SceneEnvironment
    user: SceneUser


Answer = TypeVar("Answer", bound=AnswerPart)


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A question.

    Attributes:
        role: The role that answers.
        kind: The kind of question, in one word. The prompt of a role has a text for each kind.
        facts: What the answer depends on, as plain JSON values, besides the facts of the work item.
        answer: The type of the answer.
    """

    role: RoleName
    kind: str
    facts: dict[str, Any]
    answer: type[Answer]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the question."""
        return digest([self.role, self.kind, self.facts])

    @property
    def schema(self) -> Schema:
        """The JSON schema of the answer's required fields."""
        schema = self.answer.model_json_schema()
        definitions = schema.get("$defs", {})
        if (changed := EntityState.__name__) in definitions:
            definitions[changed] = _change_schema(definitions[changed], list(self.facts.get("entities", ())))
        return Schema(self.kind, {name: schema["properties"][name] for name in self.required}, definitions)

    @property
    def required(self) -> list[str]:
        """The required fields of the answer."""
        return [name for name, field in self.answer.model_fields.items() if field.is_required()]

    def record(self) -> dict[str, Any]:
        """Return the question for the log. Facts that consist of earlier answers are replaced by their length."""
        short = {name: len(value) if name in EARLIER_ANSWERS else value for name, value in self.facts.items()}
        return {"role": self.role, "kind": self.kind, "question": short}


def _change_schema(schema: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Return the JSON schema of `EntityState`: a known entity changes, or an unknown one is created."""

    def with_fields(**fields: Any) -> dict[str, Any]:
        return {**schema, "properties": {**schema["properties"], **fields}}

    created = with_fields(new={"type": "boolean", "enum": [True]})
    if not known:
        return created
    kept = with_fields(entity={"type": "string", "enum": known}, new={"type": "boolean", "enum": [False]})
    return {"anyOf": [kept, created]}


class InvalidAnswer(NamedTuple):
    """An answer that is not valid, and the reason."""

    text: str
    error: str


Item = TypeVar("Item", bound=WorkItem, contravariant=True)


class Role(Protocol[Item]):
    """Answers questions about work items. To add a kind of role, write a class with these methods."""

    def describe(self) -> dict[str, Any]:
        """Return all settings that determine its answers, in plain types."""
        ...

    async def reply(self, question: Question[Any], item: Item, invalid: Sequence[InvalidAnswer]) -> str:
        """Return the answer as JSON: from the log if it is there, otherwise a new one, which is added to the log.

        Args:
            question: The question.
            item: The work item that it belongs to.
            invalid: Earlier answers to the same question, all invalid.
        """
        ...

    def release(self, item: Item) -> None:
        """Free what the role keeps for a work item that has ended, such as a KV cache. Most roles keep nothing."""
        return


Roles = dict[RoleName, Role[SimulatedSession]]
