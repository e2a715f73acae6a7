"""The agent's answer: one JSON object, written strictly and read tolerantly.

Written: `purpose`, `thoughts`, `proposal` and `response`, in this order, those that are empty left out. Read: also
inside a code fence or between other text, with the published field names, and with what models write for null.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from datamodules.corpus.replies import TWICE, UNREADABLE, Found, conclusion, is_example

FIELDS = ("purpose", "thoughts", "proposal", "response")
PUBLISHED_NAMES = {"proactive task": "proposal", "proactive_task": "proposal"}
AGENT_PROMPT = Path(__file__).with_name("agent_endpoint_prompt.yaml")
# What models write in place of null; without marks around it, in lower case.
NO_PROPOSAL = {
    *("null", "none", "nil", "no", "false", "undefined", "n/a", "na", "not applicable", "nothing", "no proposal"),
    *("no offer", "no task", "no action", "no action needed", "no help needed", "no help", "silence", "stay silent"),
}
_PLACEHOLDER = re.compile(r"<[^<>]*>|str(?:ing)?(?:\s*(?:\||or)\s*(?:null|none))?", re.IGNORECASE)
_SCHEMA_KEYS = {"anyOf", "oneOf", "allOf", "enum"}
_SCHEMA_TYPES = ("string", "null", "object", ["string", "null"])
ANSWER_SCHEMA: dict[str, Any] = {  # what constrained decoding writes; RFC 8259 JSON, JSON Schema 2020-12
    "type": "object",
    "properties": {
        "purpose": {"type": "string"},
        "thoughts": {"type": "string"},
        "proposal": {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1}]},
        "response": {"type": "string"},
    },
    "required": ["proposal"],
    "additionalProperties": False,
}


class Answer(BaseModel):
    """What the agent makes of a history.

    `purpose` is what the user wants, `thoughts` what the agent makes of it, `proposal` the task that it offers or
    None for none, `response` what it says to the user. All but the proposal may be empty.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    purpose: str = ""
    thoughts: str = ""
    proposal: str | None
    response: str = ""


def write_answer(answer: Answer) -> str:
    """The answer as JSON on one line."""
    fields = {name: getattr(answer, name) for name in FIELDS}
    kept = {name: value for name, value in fields.items() if value or name == "proposal"}
    return json.dumps(kept, ensure_ascii=False)


def read_answer(text: str, prompt: str | None = None) -> Answer | None:
    """The answer that a model's reply comes to, see `conclusion`; None if there is none that can be read.

    Raises nothing, whatever the text.

    Args:
        text: What the model wrote.
        prompt: What it was told to answer, whose examples are no answers; if None, the shipped prompt for endpoints.
    """
    told = _shipped_prompt() if prompt is None else prompt

    def read(content: dict[str, Any]) -> Found[Answer] | None:
        fields: dict[str, Any] = {}
        for name, value in content.items():
            fields[_field(name)] = TWICE if fields.get(_field(name), value) != value else value
        if "proposal" not in fields:
            return None
        proposal = _proposal(fields["proposal"])
        if proposal is UNREADABLE:
            return Found(UNREADABLE)
        if proposal is _FORM:
            return None
        answer = Answer(proposal=proposal, **{name: _text(fields.get(name)) for name in FIELDS if name != "proposal"})
        if is_example({name: getattr(answer, name) or "" for name in FIELDS}, told):
            return None
        return Found(answer.proposal, answer)

    found = conclusion(text, read)
    return found.value if found else None


@cache
def _shipped_prompt() -> str:
    return AGENT_PROMPT.read_text(encoding="utf-8")


def _field(name: str) -> str:
    plain = " ".join(name.lower().split())
    return PUBLISHED_NAMES.get(plain, plain)


_FORM = object()  # not a proposal, but what stands for one in a form


def _proposal(value: Any) -> Any:
    """The proposal that a field holds: text, None, `UNREADABLE`, or `_FORM`.

    Nothing in any form is None. An operation with its arguments, which some models offer, is text as JSON. A list is
    what its only item is. Other numbers, true, and several proposals do not say what is offered.
    """
    if value is None or value is False or value in ("", [], {}):
        return None
    if isinstance(value, list) and len(value) == 1:
        return _proposal(value[0])
    if isinstance(value, dict):
        is_schema = value.keys() & _SCHEMA_KEYS or value.get("type") in _SCHEMA_TYPES
        return _FORM if is_schema else _text(value) or UNREADABLE
    if not isinstance(value, str):
        return UNREADABLE
    text = _text(value).strip()
    if _PLACEHOLDER.fullmatch(text):
        return _FORM
    if not any(character.isalnum() for character in text):
        return _FORM if {*text} & {*".…?"} else None  # "..." stands for something, "-" and "[]" for nothing
    bare = " ".join(text.casefold().split()).strip(" .,;:!'\"`()[]{}*_-")
    return None if bare in NO_PROPOSAL else text


def _text(value: Any) -> str:
    """A field as text that UTF-8 can write; what is no text as JSON, and "" where a field within stands twice."""
    try:
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError):
        return ""
    return text.encode("utf-8", "replace").decode()
