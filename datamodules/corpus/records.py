"""Validated records of ProactiveBench's files.

Nothing is dropped or converted silently: a record that does not fit is refused with its file, its line or index, and
its field. Only the peculiarities of the published files are accepted: both spellings of judgment, times in words, the
text "null" for no proposal, `other_infomation`, a UTF-8 byte order mark, CRLF line ends and a blank last line.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    model_validator,
)

from datamodules.corpus.json_records import is_unicode, shown


class Category(StrEnum):
    """Type of an annotated row; follows from its proposal and its judgment."""

    MISSED_NEED = "missed_need"  # null, rejected: help was needed
    NON_RESPONSE = "non_response"  # null, accepted: no help was needed
    CORRECT_DETECTION = "correct_detection"  # text, accepted
    FALSE_ALARM = "false_alarm"  # text, rejected

    @property
    def number(self) -> int:
        """Index of this category in `list(Category)`, 0 to 3."""
        return list(Category).index(self)


PUBLISHED_CATEGORIES = {
    "Missed-Need (MN)": Category.MISSED_NEED,
    "Correct-Rejection (CR)": Category.NON_RESPONSE,
    "Non-Response (NR)": Category.NON_RESPONSE,
    "Correct-Detection (CD)": Category.CORRECT_DETECTION,
    "False-Alarm (FA)": Category.FALSE_ALARM,
}
_PUBLISHED_NAMES = {
    category: name for name, category in reversed(PUBLISHED_CATEGORIES.items())
}  # as the files write them


def _unicode(value: Any) -> Any:
    """Check that UTF-8 can write a text. JSON and YAML can escape half a surrogate pair, which is not valid text."""
    if isinstance(value, str) and not is_unicode(value):
        try:  # YAML does not join the halves of a pair
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise ValueError("expected text, got half a surrogate pair") from None
    return value


def _text(value: Any) -> Any:
    value = _unicode(value)
    if isinstance(value, str) and all(c.isspace() or unicodedata.category(c) == "Cf" for c in value):  # or invisible
        raise ValueError("expected text, got a blank")
    return value


def json_object(value: Any) -> Any:
    """Check that JSON can write an object."""
    if isinstance(value, dict):
        try:
            sound = is_unicode(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            sound = False
        if not sound:
            raise ValueError("expected JSON")
    return value


def _proposal(value: Any) -> Any:
    """Return a proposal. The published files write no proposal both as null and as the text "null"."""
    return None if isinstance(value, str) and value.strip().lower() == "null" else _text(value)


def _proposals(*kinds: type, with_null: bool = False) -> Callable[[Any], Any]:
    """Return a validator for lists of proposals, which drops null unless `with_null`; errors state the index."""

    def kept(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError("expected a list of proposals")
        proposals = []
        for index, item in enumerate(value):
            try:
                if item is not None and not isinstance(item, kinds):
                    raise ValueError(f"expected a proposal, got {shown(item)}")
                proposals.append(json_object(_proposal(item)))
            except ValueError as error:
                raise ValueError(f"index {index}: {error}") from None
        return tuple(proposal for proposal in proposals if proposal is not None or with_null)

    return kept


def _judgment(value: Any) -> Any:
    verdicts = {"accepted": True, "rejected": False}
    if isinstance(value, str):
        if value.strip().lower() not in verdicts:
            raise ValueError('expected true, false, "accepted" or "rejected"')
        return verdicts[value.strip().lower()]
    return value


def _judgments(value: Any) -> Any:
    """Return the judgments of several proposals; the judgment of a single one needs no list."""
    return tuple(_judgment(item) for item in value) if isinstance(value, (list, tuple)) else (_judgment(value),)


def _category(value: Any) -> Any:
    known = PUBLISHED_CATEGORIES | {category.value: category for category in Category}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return known[value]


def _tuple(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError("expected a list")
    return tuple(value)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    counts = Counter(names)
    if len(counts) < len(names):
        raise ValueError(f"expected each name once, got {shown(counts.most_common(1)[0][0])} twice")
    return names


Unicode = Annotated[str, BeforeValidator(_unicode)]
Text = Annotated[str, BeforeValidator(_text)]  # not blank
Proposal = Annotated[str | None, BeforeValidator(_proposal)]
Judgment = Annotated[bool, BeforeValidator(_judgment)]
JUDGMENT_SPELLINGS = ("valid", "judgment", "judgement")


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=False)
    page: ClassVar[str] = "docs/how-to/own-data.md"  # documents every field

    @model_validator(mode="before")
    @classmethod
    def _one_spelling_of_judgment(cls, data: Any) -> Any:
        spellings = [key for key in JUDGMENT_SPELLINGS if isinstance(data, dict) and key in data]
        if len(spellings) > 1:
            raise ValueError(f"expected one of the fields {', '.join(JUDGMENT_SPELLINGS)}, got {', '.join(spellings)}")
        return data


class Event(_Record):
    """One line of what the user did; `time` is epoch seconds as text, or words such as "Day 1, 8:00 PM"."""

    time: Text
    event: Text


# Only the first error is reported. Millions of them would fill the memory.
History = Annotated[tuple[Event, ...], FailFast(), BeforeValidator(_tuple)]


class AnnotatedRow(_Record):
    """A history, a proposal after it, and its judgment.

    `annotation` holds the answers of the single annotators. `category` and `help_needed` are optional, and must agree
    with the other fields. `scene` is optional: the name of the session.
    """

    history: History = Field(validation_alias="obs")
    proposal: Proposal = Field(validation_alias="pred_task")
    accepted: Judgment = Field(validation_alias=AliasChoices(*JUDGMENT_SPELLINGS))
    help_needed: bool | None = None
    annotation: Annotated[tuple[bool, ...], FailFast(), BeforeValidator(_tuple)] = ()
    stated_category: Annotated[Category | None, BeforeValidator(_category)] = Field(
        default=None, validation_alias="category"
    )
    stated_scene: Text | None = Field(default=None, validation_alias="scene")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stated_category not in (None, self.category):
            raise ValueError(
                f"field category: expected {self.category} for "
                f"{'a proposal of null' if self.proposal is None else 'a proposal in text'} that was "
                f"{'accepted' if self.accepted else 'rejected'}, got {self.stated_category}"
            )
        if self.proposal is None and self.help_needed is self.accepted:
            raise ValueError(
                f"field help_needed: expected {not self.accepted} for a proposal of null that was "
                f"{'accepted' if self.accepted else 'rejected'}, got {self.help_needed}"
            )
        return self

    @property
    def category(self) -> Category:
        if self.proposal is None:
            return Category.NON_RESPONSE if self.accepted else Category.MISSED_NEED
        return Category.CORRECT_DETECTION if self.accepted else Category.FALSE_ALARM

    @cached_property
    def history_digest(self) -> int:
        """See `history_digest`."""
        return history_digest(self.history)

    @cached_property
    def scene(self) -> str:
        """The name of the row's scene: a digest of the stated name, 16 hexadecimal digits, else see `scene_of`."""
        return scene_of(self.history) if self.stated_scene is None else _digest_of_name(self.stated_scene)

    @property
    def scenes(self) -> set[str]:
        """The names of the row's scene: `scene`, and that of `scene_of`, by which traces and files recognize it."""
        return {self.scene, scene_of(self.history)}

    def published(self) -> dict[str, Any]:
        """Return the row in the published layout."""
        return {
            "obs": [event.model_dump() for event in self.history],
            "pred_task": self.proposal,
            "valid": self.accepted,
            "help_needed": self.help_needed,
            "annotation": list(self.annotation),
            "category": _PUBLISHED_NAMES[self.category],
            **({} if self.stated_scene is None else {"scene": self.stated_scene}),
        }


class TraceProposals(_Record):
    """Reference proposals of one trace step of the agent's test set."""

    candidate_task: Annotated[tuple[str, ...], BeforeValidator(_proposals(str))]


class TestStep(_Record):
    """One step of a test trace: an event and its reference proposals."""

    __test__ = False  # pytest collects classes of this name otherwise

    observation: Event
    agent_response: TraceProposals
    task_status: bool
    judgment: Judgment | None = Field(default=None, validation_alias=AliasChoices(*JUDGMENT_SPELLINGS))


class PublishedStep(_Record):
    """One step of a trace that an agent answered, with a judgment of each proposal if there are any.

    An empty `agent_response` means null. A proposal may also be an operation with its arguments, as an object.
    """

    page: ClassVar[str] = "docs/how-to/evaluate-an-endpoint.md"

    observation: Event
    agent_response: Annotated[
        tuple[str | dict[str, Any] | None, ...], BeforeValidator(_proposals(str, dict, with_null=True))
    ]
    task_status: bool
    judgment: Annotated[tuple[bool, ...], FailFast(), BeforeValidator(_judgments)] = Field(
        default=(), validation_alias=AliasChoices(*JUDGMENT_SPELLINGS)
    )
    other_information: Annotated[dict[str, Any], BeforeValidator(json_object)] = Field(
        default_factory=dict, validation_alias=AliasChoices("other_infomation", "other_information")
    )

    @model_validator(mode="after")
    def _no_judgment_without_its_proposal(self) -> Self:
        if len(self.judgment) > max(len(self.agent_response), 1):
            raise ValueError(
                f"field judgement: expected one for each of {len(self.agent_response)} proposals, "
                f"got {len(self.judgment)}"
            )
        return self


class TraceSplit(_Record):
    """Names of some of a root's test traces, each once."""

    theme: Text | None = None
    files: Annotated[tuple[Text, ...], FailFast(), BeforeValidator(_tuple), AfterValidator(_distinct)]


def history_digest(events: Iterable[Event]) -> int:
    """Return a digest of a history: 64 bits, signed, so that it fits into an int64 tensor."""
    text = json.dumps([[event.time, event.event] for event in events])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def running_digests(events: Iterable[Event]) -> Iterator[int]:
    """Yield `history_digest` of each history of a trace, the shortest first, in linear time."""
    digest = hashlib.blake2b(b"[", digest_size=8)
    for number, event in enumerate(events):
        digest.update(f"{', ' if number else ''}{json.dumps([event.time, event.event])}".encode())
        ended = digest.copy()
        ended.update(b"]")
        yield int.from_bytes(ended.digest(), signed=True)


def _digest_of_name(name: str) -> str:
    return hashlib.blake2b(json.dumps(name).encode(), digest_size=8).hexdigest()


def scene_of(events: Sequence[Event]) -> str:
    """Return the name of the scene of a history or trace: a digest of its first event, 16 hexadecimal digits."""
    return format(history_digest(events[:1]) & (2**64 - 1), "016x")
