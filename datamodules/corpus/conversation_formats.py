"""Conversations in the formats of ShareGPT and OpenAI, converted to the published format.

A conversation ends before its first turn that cannot be kept, because later turns may depend on it: a turn that calls a
tool or answers such a call, holds an image, is blank, or must not be learned.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datamodules.corpus.json_records import parse_json
from datamodules.errors import UserError

SHAREGPT, OPENAI = "ShareGPT", "OpenAI"
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other roles keep their name
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation"}
_CALLS = ("tool_calls", "function_call", "tool_call_id")
_AFTER = "after such a turn"


def converted(record: Mapping[str, Any], counts: Counter[str]) -> Mapping[str, Any] | None:
    """Convert a conversation to the published format.

    Args:
        record: A record, whose turns may be JSON text. One that is in neither of the other formats keeps its fields.
        counts: Counts what was done; see `conversion_report`.

    Returns:
        The record. None if no answer is left in it.
    """
    record = {**record, **{field: _turns(record[field]) for field in ("conversations", "messages") if field in record}}
    name, turns = _format_of(record)
    if name is None:
        return record
    if not isinstance(turns, list):
        return {"conversations": turns}
    if name == SHAREGPT and record.get("system"):  # as LLaMA-Factory writes it
        turns = [{"from": "system", "value": record["system"]}, *turns]
    read = [_turn(turn) for turn in turns]
    end = next((place for place, (_, problem) in enumerate(read) if problem), len(read))
    counts[f"{name}: conversations"] += 1
    counts[f"{name}: turns"] += len(read)
    if end < len(read):
        counts[f"{name}: dropped {read[end][1]}"] += 1
        counts[f"{name}: dropped {_AFTER}"] += len(read) - end - 1
    kept = [turn for turn, _ in read[:end]]
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in kept]
    if all(role in ("system", "user", "assistant") for role in roles) and "assistant" not in roles[1:]:
        counts[f"{name}: left out"] += 1
        return None
    counts[f"{name}: kept"] += end
    return {"conversations": kept}


def conversion_report(counts: Mapping[str, int]) -> list[str]:
    """Return what was converted, a sentence for each format."""
    said = []
    for name in (SHAREGPT, OPENAI):
        if not counts.get(f"{name}: conversations"):
            continue
        parts = [
            f"{counts[f'{name}: conversations']} conversations converted from {name}",
            f"{counts.get(f'{name}: kept', 0)} of {counts[f'{name}: turns']} turns kept",
        ]
        start = f"{name}: dropped "
        dropped = [f"{n} {key.removeprefix(start)}" for key, n in counts.items() if key.startswith(start) and n]
        if dropped:
            parts.append(f"turns dropped: {', '.join(dropped)}")
        if left_out := counts.get(f"{name}: left out"):
            parts.append(f"{left_out} conversations left out, because no answer is left")
        said.append("; ".join(parts))
    return said


def is_conversion_count(key: str) -> bool:
    """Return whether a count is one of `converted`."""
    return key.startswith((f"{SHAREGPT}: ", f"{OPENAI}: "))


def _turns(cell: Any) -> Any:
    """Parse turns that are JSON text, as in CSV. Other values are returned as they are, and refused later."""
    try:
        return parse_json(cell, "it") if isinstance(cell, str) else cell
    except UserError:
        return cell


def _format_of(record: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the format of a record and its turns; None for other records."""
    if "messages" in record and "conversations" not in record:
        return OPENAI, record["messages"]
    turns = record.get("conversations")
    if turns == [] and "messages" not in record:
        return SHAREGPT, turns  # or any other format
    if isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns):
        return SHAREGPT, turns
    return None, None


def _turn(turn: Any) -> tuple[Any, str]:
    """Return a turn in the published format, and why it cannot be kept, if so.

    A turn of another form is returned as it is, so that the record of a conversation refuses it with its place.
    """
    if not isinstance(turn, dict):
        return turn, ""
    names = ("from", "value") if "from" in turn else ("role", "content")
    role, content = map(turn.get, names)
    if any(turn.get(call) for call in _CALLS) or (isinstance(role, str) and role in _TOOL_ROLES):
        return turn, "that call a tool or answer a call"
    if turn.get("weight") == 0:  # OpenAI's mark of an answer that is not learned
        return turn, "of weight 0"
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            return turn, "with parts that are not text"
        content = "\n".join(map(str, texts))
    if content is None or (isinstance(content, str) and not content.strip()):
        return turn, "that are blank"
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}, ""
