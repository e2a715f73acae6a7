"""Conversations of ShareGPT and OpenAI: what is kept, what is dropped and why, and what is said about it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.conversation_formats import conversion_report, is_conversion_count
from datamodules.corpus.conversations import Conversation
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples
from tests.helpers import conversations_of

Turns = list[tuple[str, Any]]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def sharegpt(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **fields}


def openai(*turns: Any, **fields: Any) -> dict[str, Any]:
    messages = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]
    return {"messages": messages, **fields}


def read(folder: Path, *records: Any) -> tuple[list[Turns], list[str]]:
    path, counts = folder / "told.jsonl", Counter[str]()
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    found = list(conversations_of(path, counts))
    assert all(map(is_conversion_count, counts))
    return [[(turn.role, turn.content) for turn in one.conversations] for one in found], conversion_report(counts)


def test_sharegpt(tmp_path: Path) -> None:
    record = sharegpt(("human", "hi"), ("gpt", "yo"), ("human", "so"), ("gpt", "ok"), id="x", system="Help.")
    found, said = read(tmp_path, record, sharegpt(("system", "S"), ("user", "a"), ("assistant", "b")))
    assert found == [
        [("system", "Help."), ("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")],
        [("system", "S"), ("user", "a"), ("assistant", "b")],
    ]
    assert said == ["2 conversations converted from ShareGPT; 8 of 8 turns kept"]


def test_openai(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]
    found, said = read(tmp_path, openai(("developer", "D"), ("user", parts), ("assistant", "yo")))
    assert found == [[("system", "D"), ("user", "two\nparts"), ("assistant", "yo")]]
    assert said == ["1 conversations converted from OpenAI; 3 of 3 turns kept"]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "that call a tool or answer a call"),
        ({"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, "that call a tool or answer a call"),
        ({"role": "tool", "content": "r", "tool_call_id": "1"}, "that call a tool or answer a call"),
        ({"role": "assistant", "content": "no", "weight": 0}, "of weight 0"),
        ({"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]}, "with parts that are not text"),
        ({"role": "assistant", "content": " \n"}, "that are blank"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "that are blank"),
    ],
)
def test_a_conversation_ends_before_a_turn_that_cannot_be_kept(
    turn: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    start, rest = (("user", "a"), ("assistant", "b")), (("user", "c"), ("assistant", "learned from what is missing"))
    found, said = read(tmp_path, openai(*start, turn, *rest), openai(("user", "a"), turn, *rest))
    assert found == [list(start)]
    assert said == [
        "2 conversations converted from OpenAI; 2 of 9 turns kept; "
        f"turns dropped: 2 {reason}, 4 after such a turn; 1 conversations left out, because no answer is left"
    ]


def test_tool_turns_of_sharegpt(tmp_path: Path) -> None:
    calls = (("function_call", "{}"), ("observation", "r"), ("gpt", "done"))
    found, said = read(tmp_path, sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), *calls))
    assert found == [[("user", "a"), ("assistant", "b"), ("user", "c")]]
    assert "turns dropped: 1 that call a tool or answer a call, 2 after such a turn" in said[0]


def test_a_conversation_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    found, said = read(tmp_path, openai(("user", "a")), sharegpt(("gpt", "a"), ("human", "b")), openai(), sharegpt())
    assert found == []
    assert [sentence.partition("; ")[2] for sentence in said] == [
        "0 of 2 turns kept; 2 conversations left out, because no answer is left",
        "0 of 1 turns kept; 2 conversations left out, because no answer is left",
    ]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (sharegpt(("human", "a"), ("bard", "b")), "field conversations[1].role"),
        (sharegpt(("human", "a"), ("gpt", 5)), "field conversations[1].content"),
        (openai(("user", "a"), ("assistant", {"text": "b"})), "field conversations[1].content"),
        ({"messages": ["hi"]}, "field conversations[0]"),
        ({"messages": "hi"}, 'field conversations: expected a list of turns, got "hi"'),
        ({"conversations": None}, "field conversations: expected a list of turns, got null"),
        ({"messages": [], "conversations": []}, "field"),
    ],
)
def test_other_turns_are_refused_with_their_place(record: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, record)
    assert caught.value.what.startswith(f"{tmp_path / 'told.jsonl'}, line 1, {named}")


TEXT = st.text(st.characters(codec="utf-8"), max_size=8).map(lambda text: f"a{text}")
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=6).map(
    lambda turns: [("user", "q"), *turns, ("assistant", "r")]
)


@few_examples
@given(turns=TURNS)
def test_the_same_turns_in_each_format_are_the_same_conversation(
    turns: Turns, tmp_path_factory: pytest.TempPathFactory
) -> None:
    published = {"conversations": [{"role": role, "content": content} for role, content in turns]}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    records = [published, openai(*turns), sharegpt(*((names[role], content) for role, content in turns))]
    path = tmp_path_factory.mktemp("told") / "told.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    expected = Conversation.model_validate(published)
    assert list(conversations_of(path)) == [expected] * 3
