import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.answers import ANSWER_SCHEMA, Answer, read_answer, write_answer
from datamodules.corpus.json_records import read_json_list
from datamodules.corpus.records import PublishedStep
from datamodules.corpus.replies import without_reasoning
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = st.builds(
    Answer,
    purpose=texts,
    thoughts=texts,
    proposal=st.none() | texts.map(lambda text: f"Do {text} now"),
    response=texts,
)
PUBLISHED = {"Purpose": "p", "Thoughts": "t", "Proactive Task": "Fix it.", "Response": "r"}
FIXED = Answer(purpose="p", thoughts="t", proposal="Fix it.", response="r")

NOTHING_IN_WORDS = ("null", "None", "none.", "N/A", "nil", "No proposal", "'null'", "-", "[]", "{}", "No", "\n", '""')
NOTHING = ["null", "false", "[]", "{}", "[null]", *map(json.dumps, NOTHING_IN_WORDS)]
UNCLEAR = ["true", "0", "1", "3.5", "NaN", '["A", "B"]', "[true]", "[[]]x"]


without_marks = texts.map(lambda text: text.replace("{", "(")).filter(lambda text: without_reasoning(text) == text)


@given(answer=answers, before=st.sampled_from(["", "Sure! ", "```json\n", "{ not json } "]), after=without_marks)
def test_a_written_answer_is_read_between_other_text(answer: Answer, before: str, after: str) -> None:
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
        *((f'{{"proposal": {nothing}}}', Answer(proposal=None)) for nothing in NOTHING),
        *((f'{{"proposal": {unclear}}}', None) for unclear in UNCLEAR),
        ('{"proposal": ["Go."]}', Answer(proposal="Go.")),
        ('{"proposal": "None of the tests pass: mend them."}', Answer(proposal="None of the tests pass: mend them.")),
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


DRAFT = '{"proposal": "Write the tests"}'
SILENT = '{"purpose": "start", "proposal": null}'
OPENINGS = (
    *("<think>", "<THINK>", "<thinking>", "<reasoning>", '<thinking budget="9">', "<seed:think>", "[THINK]"),
    *("<|begin_of_thought|>", "<|START_THINKING|>", "◁think▷", "<|think|>", "<thought>", "<scratchpad>"),
)
CLOSINGS = (
    *("</think>", "</THINK>", "</thinking>", "</reasoning>", "</thinking>", "</seed:think>", "[/THINK]"),
    *("<|end_of_thought|>", "<|END_THINKING|>", "◁/think▷", "<|/think|>", "</thought>", "</scratchpad>"),
)
CHANNELS = (
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    "analysisThe person {} assistantfinal",
    "<|channel>thought\n{}<channel|>",
)
THOUGHTS = [f"{opening}perhaps {{}} or not{closing}" for opening, closing in zip(OPENINGS, CLOSINGS, strict=True)]


@pytest.mark.parametrize("thought", [*THOUGHTS, *CHANNELS, "perhaps {} or not</think>", "{}\n</thinking>\n"])
def test_json_in_reasoning_text_is_not_an_answer(thought: str) -> None:
    before, after = thought.split("{}")
    answer = read_answer(f"{before}{DRAFT}{after}\n\n{SILENT}")
    assert answer == Answer(purpose="start", proposal=None)
    assert read_answer(f"{before}{DRAFT}{after}") is None, "a thought alone is no answer"
    if before not in ("", "perhaps "):
        assert read_answer(f"{before}{DRAFT}") is None, "a thought that was cut off is no answer"
        assert read_answer(f"{SILENT}\n{before}{DRAFT}") is None or before.startswith("analysis")


def test_reasoning_delimiters_within_an_answer_are_text() -> None:
    proposal = "Replace </think> and <think> in the template"
    assert read_answer(json.dumps({"proposal": proposal})) == Answer(proposal=proposal)


@pytest.mark.parametrize("thought", ["<think>I never write <think> twice</think>", "<think>a</think> b </think>"])
def test_delimiters_within_reasoning_do_not_hide_the_answer(thought: str) -> None:
    assert read_answer(f"{thought}\n{SILENT}") == Answer(purpose="start", proposal=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"An example:\n{DRAFT}\nMine:\n{SILENT}", None),  # several on lines of their own: the last word
        (f"{SILENT}\n{DRAFT}\n", "Write the tests"),
        (f"{SILENT}\n\nI could have said {DRAFT}", None),  # one on a line of its own, one mentioned
        (f"{SILENT}\n\nAn offer would be {DRAFT}, but no.", None),
        (f"```json\n{SILENT}\n```\n", None),
        (f"One may say {DRAFT}. I say {SILENT}", None),
        (f"{DRAFT} {DRAFT}", "Write the tests"),  # they agree
        (f"{DRAFT} and {DRAFT}, as I said", "Write the tests"),
        (f"<answer>{DRAFT}</answer>", "Write the tests"),
        (f"It is [{DRAFT}]", "Write the tests"),
    ],
)
def test_the_last_of_several_answers_counts(text: str, expected: str | None) -> None:
    answer = read_answer(text)
    assert answer is not None
    assert answer.proposal == expected


@pytest.mark.parametrize(
    "text",
    [
        f"{SILENT} or {DRAFT}, I am not sure",
        f"{DRAFT}\n{SILENT}\nThese are the choices.",
        f"[{DRAFT}, {SILENT}]",
        '{"proposal": "A", "proposal": null}',
        '{"proposal": "A", "Proactive Task": "B"}',
        '{"proposal": {"open": 1, "open": 2}}',
    ],
)
def test_a_reply_with_different_answers_has_none(text: str) -> None:
    assert read_answer(text) is None


@pytest.mark.parametrize(
    "cut",
    ['"pro', '"proposal": ', '"proposal": "Wri', '"proposal": nul', '"proposal": "W"', '"proposal": "W",\n', "", "\n"],
)
def test_a_truncated_object_gives_no_answer(cut: str) -> None:
    assert read_answer(f'{{"example": {DRAFT}, {cut}') is None
    assert read_answer(f"{SILENT}\n{{{cut}") is None, "another answer was under way"


def test_a_duplicate_field_with_an_equal_value_is_accepted() -> None:
    assert read_answer('{"proposal": "Go.", "Proactive Task": "Go."}') == Answer(proposal="Go.")


@pytest.mark.parametrize(
    "text",
    [
        '{"proposal": "the task you offer, or null for none"}',
        '{"purpose": "What the person seems to want", "thoughts": "why you offer help now, or why not", '
        '"proposal": "The task you offer.", "response": ""}',
        '{"purpose": "what the person seems to want", "proposal": null}',
        '{"proposal": "<task>"}',
        '{"proposal": "..."}',
        '{"proposal": "string or null"}',
        '{"proposal": {"type": "string"}}',
        json.dumps(ANSWER_SCHEMA),
        json.dumps(Answer.model_json_schema()),
        json.dumps({"properties": {"proposal": "Write the tests"}}),
    ],
)
def test_placeholders_and_schemas_are_not_answers(text: str) -> None:
    assert read_answer(text) is None
    assert read_answer(f"The form is {text}. {SILENT}") == Answer(purpose="start", proposal=None)


def test_an_example_from_a_users_prompt_is_not_an_answer() -> None:
    prompt = 'Answer with {"proposal": "Draft an outline."} or {"proposal": null}.\nresponse: some words'
    assert read_answer('{"proposal": "Draft an outline."}', prompt) is None
    assert read_answer('{"proposal": "Draft an outline.", "response": "Shall I?"}', prompt) is not None
    assert read_answer('{"proposal": null, "response": "some words"}', prompt) is None
    assert read_answer('{"proposal": null}', prompt) == Answer(proposal=None)


@pytest.mark.parametrize("text", ["`" * 5000, "{" * 5000, '{"a": "' * 5000, "<think>" * 5000, "</think>" * 5000])
def test_the_answer_is_found_after_many_other_objects(text: str) -> None:
    answer = read_answer(f"{text}\n{DRAFT}\n</think>{SILENT}")
    assert answer is None or answer.proposal is None


def test_braces_in_prose_do_not_hide_the_answer() -> None:
    assert read_answer("a set {a, b} " * 300 + f"\n{SILENT}") == Answer(purpose="start", proposal=None)


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
            assert answer.proposal == (proposal.strip() if proposal not in (None, "None") else None)
