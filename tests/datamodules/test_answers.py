import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.answers import ANSWER_SCHEMA, Answer, read_answer, write_answer
from datamodules.records import PublishedStep, read_json_list
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = st.builds(
    Answer,
    purpose=texts,
    thoughts=texts,
    proposal=st.none() | texts.map(str.strip).filter(lambda text: text.lower() not in ("", "null")),
    response=texts,
)
PUBLISHED = {"Purpose": "p", "Thoughts": "t", "Proactive Task": "Fix it.", "Response": "r"}
FIXED = Answer(purpose="p", thoughts="t", proposal="Fix it.", response="r")


@given(answer=answers, before=st.sampled_from(["", "Sure! ", "```json\n", "{ not json } "]), after=texts)
def test_what_is_written_is_read_whatever_stands_around_it(answer: Answer, before: str, after: str) -> None:
    assert read_answer(before + write_answer(answer) + after) == answer


@given(answer=answers)
def test_an_answer_is_written_on_one_line_in_the_order_of_the_schema(answer: Answer) -> None:
    written = write_answer(answer)
    content = json.loads(written)
    assert "\n" not in written
    assert list(content) == [name for name in ANSWER_SCHEMA["properties"] if name in content]
    assert "proposal" in content


@given(text=st.text() | st.lists(st.sampled_from([*'{}[]":,\\ua"null', "proposal"])).map("".join))
def test_reading_never_raises(text: str) -> None:
    read_answer(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(PUBLISHED), FIXED),
        (f"```json\n{json.dumps(PUBLISHED, indent=2)}\n```\nDoes this help?", FIXED),
        ('{"PROACTIVE  TASK": "null", "Response": null}', Answer(proposal=None)),
        ('{"proposal": null}', Answer(proposal=None)),
        ('{"proposal": "  "}', Answer(proposal=None)),
        ('{"thoughts": {"deep": 1}, "proposal": "Go."}', Answer(thoughts='{"deep": 1}', proposal="Go.")),
        ('{"proposal": {"operation": "open"}}', Answer(proposal='{"operation": "open"}')),
        ('{"answer": {"proposal": "Inner."}}', Answer(proposal="Inner.")),
        ('{"thoughts": "first"} then {"proposal": "Second."}', Answer(proposal="Second.")),
        ('{"proposal": "half \\ud800 a pair"}', Answer(proposal="half ? a pair")),
        ('{"proposal": "a raw\nline break"}', Answer(proposal="a raw\nline break")),
        ("null", None),
        ("", None),
        ("I would offer help with the report.", None),
        ('{"proposal": "cut off', None),
        ('{"purpose": "no proposal at all"}', None),
        ('["proposal"]', None),
        ('{"a":' * 100_000, None),
        ("{" * 100_000, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_answers_as_models_write_them(text: str, expected: Answer | None) -> None:
    assert read_answer(text) == expected


@needs_proactivebench
def test_published_answers_keep_their_proposals() -> None:
    """Each published step, put together as its model must have written it, gives its proposal again."""
    for path in sorted(PROACTIVEBENCH.glob("traces/*/*.json")):
        for step in read_json_list(path, PublishedStep):
            proposals = [text for text in step.agent_response if isinstance(text, str)]
            proposal = proposals[0] if proposals else None
            written = json.dumps({**step.other_information, "Proactive Task": proposal or "null"})
            answer = read_answer(f"```json\n{written}\n```")
            assert answer is not None
            assert answer.proposal == (proposal.strip() if proposal else None)
