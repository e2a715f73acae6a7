"""An agent's answer: one JSON object, written strictly and read tolerantly.

The fields are `purpose`, `thoughts`, `proposal` and `response`, in this order; empty ones are not written. Reading also
accepts code fences, text around the object, the published field names, and the words that models write for null.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from datamodules.corpus.replies import DUPLICATE, UNREADABLE, Found, final_answer, is_example

FIELDS = ("purpose", "thoughts", "proposal", "response")
PUBLISHED_NAMES = {"proactive task": "proposal", "proactive_task": "proposal"}
AGENT_PROMPT = Path(__file__).with_name("agent_endpoint_prompt.yaml")
# Words that models write for null; without punctuation, in lower case.
NO_PROPOSAL = {
    *("null", "none", "nil", "no", "false", "undefined", "n/a", "na", "not applicable", "nothing", "no proposal"),
    *("no offer", "no task", "no action", "no action needed", "no help needed", "no help", "silence", "stay silent"),
}
_PLACEHOLDER = re.compile(r"<[^<>]*>|str(?:ing)?(?:\s*(?:\||or)\s*(?:null|none))?", re.IGNORECASE)
_SCHEMA_KEYS = {"anyOf", "oneOf", "allOf", "enum"}
_SCHEMA_TYPES = ("string", "null", "object", ["string", "null"])
ANSWER_SCHEMA: dict[str, Any] = {  # schema of constrained decoding; RFC 8259 JSON, JSON Schema 2020-12
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
    """An answer to a history.

    `purpose` is what the user wants, `thoughts` the agent's reasoning, `proposal` the offered task or None, `response`
    the text for the user. All but the proposal may be empty.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    purpose: str = ""
    thoughts: str = ""
    proposal: str | None
    response: str = ""


def write_answer(answer: Answer) -> str:
    """Return the answer as JSON on one line."""
    fields = {name: getattr(answer, name) for name in FIELDS}
    kept = {name: value for name, value in fields.items() if value or name == "proposal"}
    return json.dumps(kept, ensure_ascii=False)


def read_answer(text: str, prompt: str | None = None) -> Answer | None:
    """Return the final answer of a model's reply, see `final_answer`; None if none can be read. Never raises.

    Args:
        text: The reply.
        prompt: The prompt, whose examples are not answers; None for the shipped prompt for endpoints.
    """
    told = _shipped_prompt() if prompt is None else prompt

    def read(content: dict[str, Any]) -> Found[Answer] | None:
        fields: dict[str, Any] = {}
        for name, value in content.items():
            fields[_field(name)] = DUPLICATE if fields.get(_field(name), value) != value else value
        if "proposal" not in fields:
            return None
        proposal = _proposal(fields["proposal"])
        if proposal is UNREADABLE:
            return Found(UNREADABLE)
        if proposal is _IS_PLACEHOLDER:
            return None
        answer = Answer(proposal=proposal, **{name: _text(fields.get(name)) for name in FIELDS if name != "proposal"})
        if is_example({name: getattr(answer, name) or "" for name in FIELDS}, told):
            return None
        return Found(answer.proposal, answer)

    found = final_answer(text, read)
    return found.value if found else None


@cache
def _shipped_prompt() -> str:
    return AGENT_PROMPT.read_text(encoding="utf-8")


def _field(name: str) -> str:
    plain = " ".join(name.lower().split())
    return PUBLISHED_NAMES.get(plain, plain)


_IS_PLACEHOLDER = object()  # a placeholder instead of a proposal


def _proposal(value: Any) -> Any:
    """Return the proposal in a field: text, None, `UNREADABLE`, or `_IS_PLACEHOLDER` for a placeholder.

    Empty values are None. An operation with its arguments, which some models offer, becomes JSON text. A list of one
    item is that item. Numbers, true and several proposals are unreadable.
    """
    if value is None or value is False or value in ("", [], {}):
        return None
    if isinstance(value, list) and len(value) == 1:
        return _proposal(value[0])
    if isinstance(value, dict):
        is_schema = value.keys() & _SCHEMA_KEYS or value.get("type") in _SCHEMA_TYPES
        return _IS_PLACEHOLDER if is_schema else _text(value) or UNREADABLE
    if not isinstance(value, str):
        return UNREADABLE
    text = _text(value).strip()
    if _PLACEHOLDER.fullmatch(text):
        return _IS_PLACEHOLDER
    if not any(character.isalnum() for character in text):
        return _IS_PLACEHOLDER if {*text} & {*".…?"} else None  # "..." is a placeholder; "-" and "[]" are null
    bare = " ".join(text.casefold().split()).strip(" .,;:!'\"`()[]{}*_-")
    return None if bare in NO_PROPOSAL else text


def _text(value: Any) -> str:
    """Return a field as text that UTF-8 can write. Other values become JSON, or "" if they contain duplicate fields."""
    try:
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError):
        return ""
    return text.encode("utf-8", "replace").decode()
