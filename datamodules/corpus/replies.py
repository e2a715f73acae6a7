"""The final answer of a model's reply.

Reasoning text, examples from the prompt and truncated text are not answers. If a reply holds several different answers,
and none clearly ends it, it has no answer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from datamodules.files.reading import is_deep

Value = TypeVar("Value")

MAX_FAILURES = 1000  # braces that begin no JSON object; a reply with more of them has no answer
UNREADABLE = object()  # decision of an answer whose decision cannot be read
CUT_OFF = object()  # replaces an object within which the reply ends
DUPLICATE = object()  # replaces the value of a duplicate field with different values

# Delimiters of reasoning text: <think> of most models, and similar ones such as <thinking>, <reasoning>, <seed:think>
# and <|begin_of_thought|>; Mistral's [THINK]; Kimi's ◁think▷; the channels of gpt-oss, also if a server dropped their
# special tokens; Gemma's.
_NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?(?:_content)?|reflection|analysis|scratchpad|inner_monologue)"
_CLOSE = "|".join(
    (
        rf"[<◁]\|?(?:/|end_(?:of_)?)(?:\w+[:_])?{_NAMES}\|?\s*[>▷]",
        r"\[/THINK\]",
        r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
        r"\bassistantfinal",
        r"<channel\|>",
        r"<unused95>",
    )
)
_OPEN = "|".join(
    (
        rf"[<◁]\|?(?:\w+[:_])?{_NAMES}\|?(?:\s[^<>]*)?[>▷]",
        r"\[THINK\]",
        r"<\|channel\|>",
        r"\A(?-i:analysis(?=[A-Z\"{]))",
        r"<\|channel>(?!\s*final)",
        r"<unused94>",
    )
)
_THOUGHT_ENDS = re.compile(_CLOSE, re.IGNORECASE)
_MARKS = re.compile(rf"(?P<object>\{{)|(?P<close>{_CLOSE})|(?P<open>{_OPEN})", re.IGNORECASE)
# Allowed around an answer on its lines: fences, emphasis, tags, special tokens.
_MARKUP = re.compile(r"(?:\s|`++\w*+|</?\w++>|<\|\w++\|>|[*_.])*+")
# The rest of a text that was truncated within a number, true, false or null, or before a bracket or comma.
_TAIL = re.compile(r"[\w.+-]*\s*")
_DESCRIPTION = re.compile(r"""^[\s{*-]*["'`]?(\w[\w ]*?)["'`]?\s*:\s*["'`]?(.+?)["'`]?,?[\s}]*$""", re.MULTILINE)


@dataclass(frozen=True)
class Found(Generic[Value]):
    """An answer in a reply. Two answers agree if their `decision` is equal; `value` is the whole answer."""

    decision: Any
    value: Value | None = None


def final_answer(text: str, read: Callable[[dict[str, Any]], Found[Value] | None]) -> Found[Value] | None:
    """Return the final answer of a reply; None if it has no answer. Never raises.

    If all answers agree, the last one is returned. Otherwise only answers on separate lines count, if there are any. If
    these differ too, the last answer is returned if it ends the reply, else an `UNREADABLE` one.

    Args:
        text: The reply.
        read: Returns the answer that a JSON object is, or None.
    """
    spoken = without_reasoning(text)
    if spoken is None:
        return None
    objects = _objects(spoken)
    if objects is None:
        return Found(UNREADABLE)
    answers = [(found, start, end) for content, start, end in objects for found in _answers(content, read)]
    if not answers:
        return None
    alone = [answer for answer in answers if _is_alone(spoken, *answer[1:])]
    for some in (answers, alone):
        if some and all(found.decision == some[0][0].decision for found, _, _ in some):
            return some[-1][0]
    last, _, end = answers[-1]
    return last if _MARKUP.fullmatch(spoken, end) else Found(UNREADABLE)


def _is_alone(text: str, start: int, end: int) -> bool:
    """Check that the lines of a part of a text contain nothing else but markup."""
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    after = text[end:] if line_end < 0 else text[end:line_end]
    return bool(_MARKUP.fullmatch(text, line_start, start) and _MARKUP.fullmatch(after))


def without_reasoning(text: str) -> str | None:
    """Return a reply without its reasoning text; None if the reply ends within reasoning.

    If an end of reasoning has no beginning, everything before it is reasoning: some prompts contain the beginning.
    Delimiters within a JSON object are text.
    """
    spoken = ""
    begin = place = failures = 0
    while mark := _MARKS.search(text, place):
        place = mark.end()
        if mark.lastgroup == "object":
            decoded = _decode(text, mark.start()) if failures < MAX_FAILURES else None
            failures += not isinstance(decoded, tuple)
            place = decoded[1] if isinstance(decoded, tuple) else place
        elif mark.lastgroup == "close":
            spoken, begin = "", place
        elif (closed := _THOUGHT_ENDS.search(text, place)) is None:
            return None
        else:
            spoken += text[begin : mark.start()] + "\n"
            begin = place = closed.end()
    return spoken + text[begin:]


@lru_cache(maxsize=16)
def examples(prompt: str) -> Mapping[str, frozenset[str]]:
    """Return the example values of each field in a prompt; names and values as in `_plain`."""
    found: dict[str, set[str]] = {}
    shown = [item for content, _, _ in _objects(prompt) or () for item in content.items()]
    for name, value in [*shown, *_DESCRIPTION.findall(prompt)]:
        if isinstance(value, str):
            found.setdefault(_plain(name), set()).update({_plain(value), _plain(re.split("[,;(]", value)[0])})
    return {name: frozenset(values) for name, values in found.items()}


def is_example(texts: Mapping[str, str], prompt: str) -> bool:
    """Check whether all texts of an answer, by field, are examples of that field in the prompt."""
    known = examples(prompt)
    given = {name: text for name, text in texts.items() if text.strip()}
    return bool(given) and all(_plain(text) in known.get(_plain(name), ()) for name, text in given.items())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!\"'`") or text


def _objects(text: str) -> list[tuple[dict[str, Any], int, int]] | None:
    """Return the outermost JSON objects in a text, from left to right, with their start and end.

    None if the text ends within an object, or contains more than `MAX_FAILURES` braces that begin no object.
    """
    objects: list[tuple[dict[str, Any], int, int]] = []
    failures, start = 0, text.find("{")
    while start >= 0:
        decoded = _decode(text, start)
        if isinstance(decoded, tuple):
            objects.append((decoded[0], start, decoded[1]))
        failures += decoded is None
        if decoded is CUT_OFF or failures > MAX_FAILURES:
            return None
        start = text.find("{", decoded[1] if isinstance(decoded, tuple) else start + 1)
    return objects


def _decode(text: str, start: int) -> Any:
    """Return the JSON object at `start` and its end; None if there is none, `CUT_OFF` if the text ends within it."""
    try:
        content, end = _DECODER.raw_decode(text, start)
        return None if is_deep(text[start:end]) else (content, end)
    except json.JSONDecodeError as error:
        return CUT_OFF if error.msg.startswith("Unterminated") or _TAIL.fullmatch(text, error.pos) else None
    except (ValueError, RecursionError):
        return None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        content[name] = DUPLICATE if name in content and content[name] != value else value
    return content


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique)


def _answers(content: dict[str, Any], read: Callable[[dict[str, Any]], Found[Value] | None]) -> list[Found[Value]]:
    """Return the answer that an object is, or the answers in it."""
    answers: list[Found[Value]] = []
    within: list[Any] = [content]
    for value in within:
        if isinstance(value, list):
            within.extend(value)
        elif isinstance(value, dict) and not value.keys() & {"$schema", "properties"}:  # a JSON schema is no answer
            if (found := read(value)) is not None:
                answers.append(found)
            else:
                within.extend(value.values())
    return answers
