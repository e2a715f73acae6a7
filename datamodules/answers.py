"""The agent's answer: one JSON object, written strictly and read tolerantly.

Written: `purpose`, `thoughts`, `proposal` and `response`, in this order, those that are empty left out. Read: also
inside a code fence or between other text, with the published field names, and with the text "null" for null.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

FIELDS = ("purpose", "thoughts", "proposal", "response")
PUBLISHED_NAMES = {"proactive task": "proposal", "proactive_task": "proposal"}
MOST_OBJECTS = 64  # tried in one text: what models write holds few, and text of braces alone shall not take long
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


def read_answer(text: str) -> Answer | None:
    """The first answer in what a model wrote; None if there is none. Raises nothing, whatever the text."""
    for content in json_objects(text):
        fields = {_field(name): value for name, value in content.items()}
        if "proposal" in fields:
            values = {name: _text(fields.get(name)) for name in FIELDS}
            proposal = values.pop("proposal").strip()
            return Answer(proposal=None if proposal.lower() in ("", "null") else proposal, **values)
    return None


def _field(name: str) -> str:
    plain = " ".join(name.lower().split())
    return PUBLISHED_NAMES.get(plain, plain)


def _text(value: Any) -> str:
    """A field as text that UTF-8 can write; an operation with its arguments, which some models offer, as JSON."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that a model wrote, from left to right, outer ones before what they hold."""
    decoder = json.JSONDecoder(strict=False)
    start = -1
    for _ in range(MOST_OBJECTS):
        start = text.find("{", start + 1)
        if start < 0:
            return
        try:
            content, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        yield content
