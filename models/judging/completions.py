"""Parses responses of chat endpoints: the model's text, errors in any of several places, and waiting times."""

import email.utils
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field

from datamodules.files.reading import is_deep
from models.judging.budget import Usage

RETRIED = (408, 409, 425, 429)  # status codes that a retry may help with, besides those from 500
ERROR_FIELDS = ("error", "errors", "message", "detail", "msg", "error_message", "error_msg")


@dataclass(frozen=True)
class Received:
    """A complete, decoded response; header names are lower case."""

    status_code: int
    reason_phrase: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


class _Message(BaseModel):
    content: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    reasoning: Any = None
    reasoning_content: Any = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class Completion(BaseModel):
    """The fields of a chat completion that are used."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Any = None


@dataclass(frozen=True)
class Reply:
    """A model's reply to one request.

    Attributes:
        text: Its text, without reasoning.
        finish_reason: Why it ended, if the server says so.
        usage: The tokens of the request.
        only_reasoning: Whether the server put all text into a field for reasoning.
    """

    text: str
    finish_reason: str | None
    usage: Usage
    only_reasoning: bool

    @classmethod
    def of(cls, content: Any) -> "Reply":
        """Parse a response.

        Raises:
            pydantic.ValidationError: It is not a chat completion.
        """
        completion = Completion.model_validate(content)
        choice = completion.choices[0]
        text = text_of(choice.message.content).encode("utf-8", "replace").decode()
        reasoning = choice.message.reasoning or choice.message.reasoning_content
        return cls(text, choice.finish_reason, Usage.of(completion.usage), not text.strip() and bool(reasoning))


def unsupported_field(content: Any, text: str, fields: Iterable[str]) -> str | None:
    """The first of the given request fields that an error names, in `param` or in its message; None if it names none.

    Args:
        content: The response as JSON.
        text: The response as text.
        fields: Names of fields of the request's body.
    """
    error = content.get("error") if isinstance(content, dict) else None
    named = str(error.get("param")) if isinstance(error, dict) else ""
    words = {"response_format": ("response_format", "json_schema")}
    return next(
        (name for name in fields if named.startswith(name) or any(word in text for word in words.get(name, (name,)))),
        None,
    )


def text_of(content: str | dict[str, Any] | list[str | dict[str, Any]] | None) -> str:
    """The text of a message, which may be a list of parts; reasoning, images and tool calls are skipped."""
    if content is None or isinstance(content, str):
        return content or ""
    text = ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            text += part
        elif part.get("type", "text") in ("text", "output_text") and not part.get("thought"):
            value = part.get("text")
            text += value if isinstance(value, str) else ""
    return text


def json_of(content: bytes) -> Any:
    """Parse a response body as JSON; None if it is not JSON, or nested too deeply."""
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        return None if is_deep(text) else json.loads(text)
    except (ValueError, RecursionError):
        return None


def error_of(content: Any) -> str | None:
    """The error message in a response, from any of the usual fields; None if there is none."""
    if isinstance(content, list):
        return next((found for item in content if (found := error_of(item))), None)
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    if isinstance(choices, list) and choices and not content.get("error"):
        first = choices[0]
        return _sentence(first["error"]) if isinstance(first, dict) and first.get("error") else None
    return next((_sentence(content[name]) for name in ERROR_FIELDS if content.get(name)), None)


def _sentence(error: Any) -> str:
    if isinstance(error, list):
        return _sentence(error[0]) if error else ""
    if not isinstance(error, dict):
        return error if isinstance(error, str) else json.dumps(error)
    found = next((_sentence(error[name]) for name in ERROR_FIELDS if error.get(name)), json.dumps(error))
    return f"{found} ({error['code']})" if error.get("code") else found


def is_refusal(response: Received, content: Any) -> bool:
    """Whether a retry is useless, judged by the status, or by the error code in a response with status 200."""
    code = response.status_code
    if code == 200 and isinstance(content, dict) and error_of(content):
        error = content.get("error")
        said = str((error if isinstance(error, dict) else content).get("code"))
        code = int(said) if re.fullmatch("[1-5][0-9]{2}", said) else 500
    return code != 200 and code < 500 and code not in RETRIED


def streams(response: Received) -> bool:
    """Whether a response is a stream: server-sent events, or one JSON object per line."""
    kind = response.headers.get("content-type", "").lower()
    lines = [line for line in response.content.splitlines() if line.strip()]
    return (
        kind.startswith(("text/event-stream", "application/x-ndjson", "application/jsonl"))
        or (bool(lines) and lines[0].startswith((b"data:", b"event:", b": ")))
        or (len(lines) > 1 and all(isinstance(json_of(line), dict) for line in lines[:2]))
    )


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size or (unit == "hours" and seconds >= size):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def retry_after(value: str | None) -> float | None:
    """Parse a Retry-After header, seconds or a date, to seconds (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
