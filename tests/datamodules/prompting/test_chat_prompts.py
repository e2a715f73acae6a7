"""Prompts and verdicts of chat endpoints: data stays data, and a verdict is read only where there is one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import AGENT_PROMPT, JUDGE_PROMPT, ChatPrompt, read_judgment, read_verdict
from tests.datamodules.conftest import few_examples, says_something

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(says_something)


@few_examples
@given(st.lists(TEXT, min_size=1, max_size=3), st.none() | TEXT)
def test_the_shipped_judge_prompt_contains_the_data_as_json(events: list[str], proposal: str | None) -> None:
    history = [Event(time="1", event=event) for event in events]
    system, user = ChatPrompt.read(JUDGE_PROMPT, with_proposal=True).messages(history, proposal)
    assert (system["role"], user["role"]) == ("system", "user")
    assert json.loads(user["content"]) == {
        "events": [event.model_dump() for event in history],
        "proposal": proposal,
    }


@few_examples
@given(st.lists(TEXT | st.sampled_from(["{events}", "{proposal}", '"}]']), min_size=1, max_size=3))
def test_the_shipped_agent_prompt_contains_the_data_as_json(events: list[str]) -> None:
    history = [Event(time="1", event=event) for event in events]
    _, user = ChatPrompt.read(AGENT_PROMPT, with_proposal=False).messages(history)
    assert json.loads(user["content"]) == {"events": [event.model_dump() for event in history]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("system: a\nuser: '{events}'", "part user: expected the placeholders {events} and {proposal}"),
        ("system: a\nuser: none", "part user: expected the placeholders"),
        ("system: a", "part user: Field required"),
        ("system: a\nuser: '{events}{proposal}'\nmore: b", "part more: Extra inputs"),
        ("- a", "part top level"),
        ('system: "a \\ud83d"\nuser: "{events}{proposal}"', "half a surrogate pair, in line 1"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        ChatPrompt.read(tmp_path / "prompt.yaml", with_proposal=True)
    assert caught.value.what.startswith(f"{tmp_path / 'prompt.yaml'}")
    assert message in caught.value.what
    assert str(JUDGE_PROMPT) in caught.value.hint


def test_an_agents_prompt_with_a_proposal_placeholder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the placeholders \{events\} and no other"):
        ChatPrompt.read(JUDGE_PROMPT, with_proposal=False)
    with pytest.raises(UserError, match=r"none.yaml: No such file"):
        ChatPrompt.read(tmp_path / "none.yaml", with_proposal=False)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"thought": "fine", "judgment": "accepted"}', True),
        ('{"thought": "no", "judgement": "Rejected"}', False),
        ('```json\n{"Verdict": "accept"}\n```', True),
        ('Here it is: {"accepted": false} I hope that helps', False),
        ('{"result": {"judgment": "accepted"}}', True),
        ('{"judgment": "accepted", "details": {"accepted": false}}', True),
        ('<think>{"judgment": "accepted"}? No.</think>{"judgment": "rejected"}', False),
        ("accepted", True),
        ("I see no use in this.\n\n**Rejected.**\n", False),
        ("Judgement: accepted", True),
        ("This is not accepted", None),
        ("It could be accepted or rejected.", None),
        ('{"judgment": "perhaps"}', None),
        ('{"judgment": "accepted", ', None),  # cut off
        ('{\n "thought": "fine",\n "judgment": "accepted"', None),
        ('{"details": {"accepted": true}, "judgment": rej', None),
        ("Final verdict: **rejected**", False),
        ("<answer>accepted</answer>", True),
        ('{"judgment": "accepted", "accepted": false}', None),
        ('{"judgment": "accepted", "judgment": "rejected"}', None),
        ('{"judgment": "accepted or rejected"}', None),
        ('{"judgment": "perhaps"}\naccepted', None),
        ('{"judgment": "accepted"}\n{"judgment": "rejected"}', False),
        ('{"judgment": "accepted"} or {"judgment": "rejected"}, hard to say', None),
        ('I have to answer with {"thought": "one or two sentences", "judgment": "accepted"}', None),
        ('So {"thought": "one or two sentences", "judgment": "accepted"}. {"judgment": "rejected"}', False),
        ('<think>I would say {"judgment": "accepted"}', None),
        ("<think>It is accepted", None),
        ("<reasoning>\naccepted", None),
        ("hm\naccepted</think>", None),
        ("hm\naccepted</think>\nrejected", False),
        ("[THINK]accepted[/THINK]rejected", False),
        ("<|channel|>analysis<|message|>accepted", None),
        ('{"thought": "It could be acc', None),
        ("", None),
    ],
)
def test_verdicts_as_models_write_them(text: str, verdict: bool | None) -> None:
    assert read_verdict(text) is verdict


@few_examples
@given(st.text(st.characters(), max_size=60) | st.text(st.sampled_from('{}[]":,acdejprt\n '), max_size=60))
def test_reading_a_verdict_never_raises(text: str) -> None:
    assert read_verdict(text) in (True, False, None)
    assert isinstance(read_judgment(text)[1], str)


def test_the_reason_belongs_to_the_verdict_that_counts() -> None:
    assert read_judgment('{"thought": "because", "judgment": "accepted"}') == (True, "because")
    assert read_judgment('{"thought": "a", "judgment": "accepted"}\n{"thought": "b", "judgment": "rejected"}') == (
        False,
        "b",
    )
    assert read_judgment('{"thought": 5, "judgment": "accepted"}') == read_judgment("accepted") == (True, "")
    assert read_judgment('{"thought": "because"}') == (None, "")


def test_an_example_from_a_users_prompt_is_not_a_verdict() -> None:
    prompt = 'Say {"why": "your reason", "verdict": "accepted"} or {"verdict": "rejected"}'
    assert read_verdict('{"why": "your reason", "verdict": "accepted"}', prompt) is None
    assert read_verdict('{"why": "it helps", "verdict": "accepted"}', prompt) is True
    assert read_verdict('{"verdict": "rejected"}', prompt) is False
