"""Prompt templates, which render rows as segments.

A prompt is a list of segments in a fixed order: instructions, events, then the proposal with its verdict slot, or the
agent's answer. Each segment is tokenized on its own, so rows with the same history have the same token ids for it, and
truncation drops whole events. Text from data is escaped to one line and never becomes a special token.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from datamodules.corpus.records import AnnotatedRow, Event, Unicode
from datamodules.errors import UserError
from datamodules.escaping import on_one_line
from datamodules.files.reading import read_text
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from datamodules.prompting.segments import Data, Segment, plain_text

MAX_PROMPT_BYTES = 2**20  # bytes of a prompt file
PROMPT_HINT = "Give the path of a prompt file."
DEFAULT_PROMPT = Path(__file__).with_name("reward_prompt.yaml")
DEFAULT_AGENT_PROMPT = Path(__file__).with_name("agent_prompt.yaml")
FORMS = ("", "_json", "_stripped")  # endings of placeholders: text on one line, as JSON, or without white space around
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Template(BaseModel):
    """The parts of every prompt. `placeholders` names the data that may be inserted into each part."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    default: ClassVar[Path]
    placeholders: ClassVar[dict[str, set[str]]] = {"event": {"time", "event"}}
    last_parts: ClassVar[tuple[str, ...]]  # what may follow the events

    instructions: Unicode
    event: Unicode

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a template from a YAML file.

        Raises:
            UserError: The file cannot be read, lacks a part, or names an unknown part or placeholder.
        """
        try:
            return cls.parse(parse_yaml(read_text(path, MAX_PROMPT_BYTES, "data.prompt", PROMPT_HINT)), str(path))
        except NotYamlError as error:
            raise UserError(f"data.prompt: {path} is not YAML: {error}", f"Start from {cls.default}.") from error

    @classmethod
    def parse(cls, parts: Any, where: str) -> Self:
        """Make a template from a mapping of its parts; for errors see `read`."""
        try:
            template = cls.model_validate(parts)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            part, problem = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise UserError(
                f"data.prompt: {where}, part {part or 'top level'}: {problem}",
                f"Start from {cls.default}.",
            ) from error
        for part in cls.model_fields:
            names = cls.placeholders.get(part, set())
            known = {f"{name}{form}" for name in names for form in FORMS}
            found = set(_PLACEHOLDER.findall(getattr(template, part)))
            for name in sorted(found):
                if name not in known:
                    raise UserError(
                        f"data.prompt: {where}, part {part}: unknown placeholder {{{name}}}",
                        f"Use {', '.join(f'{{{name}}}' for name in sorted(known)) or 'no placeholder'} there.",
                    )
            if part in names and not found & {f"{part}{form}" for form in FORMS}:
                raise UserError(
                    f"data.prompt: {where}, part {part}: does not say where the {part} stands",
                    f"Write {{{part}}} or {{{part}_json}} there.",
                )
        return template


class RewardTemplate(Template):
    """Prompt of a reward classifier; `reward_prompt.yaml` explains each part."""

    default = DEFAULT_PROMPT
    placeholders: ClassVar[dict[str, set[str]]] = {**Template.placeholders, "proposal": {"proposal"}}
    last_parts = ("proposal", "no_proposal")

    proposal: Unicode
    no_proposal: Unicode


class AgentTemplate(Template):
    """Prompt of an agent; `agent_prompt.yaml` explains each part."""

    default = DEFAULT_AGENT_PROMPT
    last_parts = ("answer",)

    answer: Unicode


def render(template: RewardTemplate, row: AnnotatedRow) -> list[Segment]:
    """Render a row: instructions, events in time order, proposal with verdict slot."""
    return [*render_history(template, row.history), render_proposal(template, row.proposal)]


def render_proposal(template: RewardTemplate, proposal: str | None) -> Segment:
    """Render a proposal with its verdict slot."""
    return _fill(template.no_proposal, {}) if proposal is None else _fill(template.proposal, {"proposal": proposal})


def render_history(template: Template, history: Iterable[Event]) -> list[Segment]:
    """Render a history: instructions, and the events in the given order."""
    return [_fill(template.instructions, {}), *(render_event(template, event) for event in history)]


def render_event(template: Template, event: Event) -> Segment:
    """Render one event."""
    return _event_segment(template.event, event.time, event.event)


@lru_cache(maxsize=2**16)  # rows of a scene share their events
def _event_segment(text: str, time: str, event: str) -> Segment:
    return _fill(text, {"time": time, "event": event})


def rendered_digest(template: Template, history: Iterable[Event]) -> bytes:
    """Return a digest of what `render_history` returns."""
    events = (_event_key(template.event, event.time, event.event) for event in history)
    return hashlib.sha256(b"".join((repr(_fill(template.instructions, {})).encode(), *events))).digest()


@lru_cache(maxsize=2**16)
def _event_key(text: str, time: str, event: str) -> bytes:
    return hashlib.sha256(repr(_event_segment(text, time, event)).encode()).digest()


def _fill(text: str, values: Mapping[str, str]) -> Segment:
    parts: list[str | Data] = []
    for index, piece in enumerate(_PLACEHOLDER.split(text)):
        if index % 2 == 0:
            parts.append(piece)
        elif piece.endswith("_json"):
            quoted = json.dumps(values[piece.removesuffix("_json")], ensure_ascii=False)
            parts.append(Data(on_one_line(quoted)))
        elif piece.endswith("_stripped"):
            parts.append(Data(on_one_line(values[piece.removesuffix("_stripped")]).strip()))
        else:
            parts.append(Data(on_one_line(values[piece])))
    return tuple(part for part in parts if part)


def stripped_placeholders(text: str) -> str:
    """Return a part of a template in which data lose the white space around them; JSON keeps its quotes."""
    return _PLACEHOLDER.sub(
        lambda found: found[0] if found[1].endswith(FORMS[1:]) else f"{{{found[1]}_stripped}}", text
    )


def training_text(template: RewardTemplate, rows: Iterable[AnnotatedRow]) -> list[str]:
    """Return the distinct segments of rows as text, in order of appearance, to train a tokenizer on."""
    return list(dict.fromkeys(plain_text(segment) for row in rows for segment in render(template, row)))
