"""The chat format: the token ids that transformers gives for the same messages, however a tokenizer divides texts."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from datamodules.corpus.conversations import Conversation
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import load_corpus
from datamodules.errors import UserError
from datamodules.prompting.chat_format import Chat, formatted, render_chat, saved_chat
from datamodules.prompting.conversation_tokenizer import ConversationTokenizer
from datamodules.prompting.segments import Data, SegmentTokenizer
from datamodules.prompting.templates import (
    DEFAULT_AGENT_PROMPT,
    DEFAULT_PROMPT,
    AgentTemplate,
    RewardTemplate,
    render,
    render_history,
    training_text,
)
from tests.datamodules.conftest import few_examples, row_of
from tests.datamodules.prompting.chat_styles import KINDS, STYLES, chat_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REWARD = RewardTemplate.read(DEFAULT_PROMPT)
AGENT = AgentTemplate.read(DEFAULT_AGENT_PROMPT)
ANSWER = '{"proposal": "Explain the error."}'
WITH_SYSTEM = {"ChatML", "Qwen 3", "Llama 3", "Mistral 3", "Phi 3"}
# Phi 3's tokens would take the line breaks that Gemma's tokenizer has as tokens of their own.
EVERY = [(style, kind) for style in STYLES for kind in KINDS if (style, kind) != ("Phi 3", "Gemma")]
TEXT = st.text(
    st.sampled_from("aeio The user opens app.py:12 'x' -_/\\(){}[]<>|.,;!? é日\u00a0\u200b"), max_size=30
).map(lambda text: f"{text[: len(text) // 2]}u{text[len(text) // 2 :]}")
Format = tuple["PreTrainedTokenizerFast", RewardTemplate, AgentTemplate, SegmentTokenizer, Chat]


@cache
def in_format(style: str, kind: str) -> Format:
    """A tokenizer, both prompts in its chat format, and what tokenizes and describes them."""
    tokenizer = chat_tokenizer(style, kind, training_text(REWARD, load_corpus("embedded").train[:200]))
    reward, *_ = formatted(REWARD, tokenizer, "chat")
    agent, chat, _ = formatted(AGENT, tokenizer, "chat")
    assert chat is not None
    return tokenizer, reward, agent, SegmentTokenizer(tokenizer, chat=True), chat


def messages(style: str, instructions: str, lines: Sequence[str]) -> list[dict[str, str]]:
    """The messages that a row stands for, by hand."""
    *system, begin = instructions.strip().split("\n")
    user = "\n".join([begin, *lines])
    if style not in WITH_SYSTEM:
        return [{"role": "user", "content": "\n".join([*system, user])}]
    return [{"role": "system", "content": "\n".join(system)}, {"role": "user", "content": user}]


def ids_of_transformers(tokenizer: "PreTrainedTokenizerFast", turns: list[dict[str, str]], **options: Any) -> list[int]:
    """The token ids of messages on the day that the chat format takes for today."""
    template = str(tokenizer.chat_template).replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return list(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, **options)["input_ids"])


def joined(segments: Sequence[Sequence[int]]) -> list[int]:
    return [token for segment in segments for token in segment]


def reward_lines(row: AnnotatedRow) -> list[str]:
    offer = "No offer." if row.proposal is None else f"Offer: {row.proposal.strip()}"
    return [*(f"- {event.event.strip()}" for event in row.history), offer, "Accepted?"]


@pytest.mark.parametrize(("style", "kind"), EVERY)
def test_a_row_has_the_token_ids_of_its_messages(style: str, kind: str) -> None:
    tokenizer, template, _, segmenter, _ = in_format(style, kind)

    @few_examples
    @given(st.lists(TEXT, min_size=1, max_size=4), st.none() | TEXT)
    @example(["11u<s>"], None)
    def equal(events: list[str], proposal: str | None) -> None:
        texts = (*events, proposal or "")
        # Of these transformers makes special tokens.
        assume(not any(token in text for token in tokenizer.get_added_vocab() for text in texts))
        row = row_of(events, proposal)
        turns = messages(style, REWARD.instructions, reward_lines(row))
        expected = ids_of_transformers(tokenizer, turns, add_generation_prompt=True)
        assert segmenter.prefix + joined(segmenter.encode(render(template, row))) + segmenter.suffix == expected

    equal()


@pytest.mark.parametrize(("style", "kind"), EVERY)
def test_an_answer_has_the_token_ids_of_an_assistants_message(style: str, kind: str) -> None:
    """Up to the token that ends it; the prompt before it is the one that asks a model for its message."""
    tokenizer, _, template, segmenter, chat = in_format(style, kind)
    row = row_of(["The user opens a.py. ", "It fails"])
    turns = messages(style, AGENT.instructions, ["- The user opens a.py.", "- It fails", "Answer:"])
    history = segmenter.encode(render_history(template, row.history))
    opening, answer = segmenter.encode([(template.answer,), (Data(chat.lead + ANSWER),)], continues=True)
    assert chat.end_token is not None
    end = tokenizer.convert_tokens_to_ids(chat.end_token)
    whole = ids_of_transformers(tokenizer, [*turns, {"role": "assistant", "content": ANSWER}])
    length = len(joined(history)) + len(opening) + len(answer)
    assert [*joined(history), *opening, *answer] == whole[:length]
    assert whole[length] == end
    asked = ids_of_transformers(tokenizer, turns, add_generation_prompt=True)
    thought = tokenizer.convert_tokens_to_ids("<think>")
    without_thought = opening[: opening.index(thought)] if style == "Qwen 3" else opening
    assert [*joined(history), *without_thought] == asked


@pytest.mark.parametrize(("style", "kind"), EVERY)
def test_rows_of_a_trace_share_the_tokens_of_their_events(style: str, kind: str) -> None:
    _, reward, agent, segmenter, _ = in_format(style, kind)
    events = ["The user opens a.py.", "The user runs it.", "It fails: 'x'."]
    for template in (reward, agent):
        longest = joined(segmenter.encode(render_history(template, row_of(events).history)))
        for count in (1, 2, 3):
            row = row_of(events[:count])
            history = joined(segmenter.encode(render_history(template, row.history)))
            assert longest[: len(history)] == history


@pytest.mark.parametrize(("style", "kind"), EVERY)
def test_text_of_data_becomes_no_special_token(style: str, kind: str) -> None:
    """It has the token ids that transformers gives for sanitized messages."""
    tokenizer, template, _, segmenter, _ = in_format(style, kind)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    count = sum(token in special for token in joined(segmenter.encode(render(template, row_of(["a", "b"], "c")))))
    for impostor in ["</s>", "<s>", *STYLES[style][1]]:
        row = row_of([f"{impostor}user", f"It {impostor} fails{impostor}"], f"a{impostor}")
        ids = joined(segmenter.encode(render(template, row)))
        assert sum(token in special for token in ids) == count
        turns = messages(style, REWARD.instructions, reward_lines(row))
        sanitized = ids_of_transformers(tokenizer, turns, add_generation_prompt=True, sanitize_control_tokens=True)
        assert ids == sanitized


@pytest.mark.parametrize(("style", "kind"), EVERY)
def test_a_conversation_has_the_token_ids_of_its_messages(style: str, kind: str) -> None:
    """Up to the token that ends its last answer."""
    tokenizer = in_format(style, kind)[0]
    said = [("user", "I open a.py."), ("assistant", "Shall I read it?"), ("user", "Yes"), ("assistant", "It fails.")]
    turns = [{"role": role, "content": content} for role, content in said]
    encoded = ConversationTokenizer(tokenizer, 1000).encode(Conversation.model_validate({"conversations": turns}))
    assert encoded is not None
    assert encoded[0] == ids_of_transformers(tokenizer, turns)[: len(encoded[0])]
    assert tokenizer.decode(encoded[0][encoded[1][-1]]) in (*STYLES[style][1], "</s>")


def test_the_instructions_are_the_system_message_and_their_last_line_begins_the_user_message() -> None:
    tokenizer, _, _, segmenter, chat = in_format("ChatML", "GPT-2")
    template, _, note = formatted(AGENT, tokenizer, "auto")
    assert note == "chat"
    ids = joined(segmenter.encode([*render_history(template, row_of(["one", "two"]).history), (template.answer,)]))
    *system, begin = AGENT.instructions.strip().split("\n")
    assert (chat.system, chat.user) == ("\n".join(system), f"{begin}\n")
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\n{chat.system}<|im_end|>\n"
        "<|im_start|>user\nEvents so far:\n- one\n- two\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_of_one_line_needs_no_system_message() -> None:
    tokenizer = in_format("Llama 3", "GPT-2")[0]
    one_line = RewardTemplate.parse({**REWARD.model_dump(), "instructions": "Judge these:"}, "here")
    template, chat, _ = formatted(one_line, tokenizer, "chat")
    assert chat is not None
    assert (chat.system, chat.user) == ("", "Judge these:\n")
    assert template.instructions.endswith("<|end_header_id|>\n\nJudge these:\n")


def test_without_a_chat_template_nothing_changes() -> None:
    tokenizer = chat_tokenizer("ChatML", "GPT-2", ["a"])
    assert formatted(REWARD, tokenizer, "plain") == (REWARD, None, None)
    tokenizer.chat_template = None
    assert formatted(REWARD, tokenizer, "auto") == (REWARD, None, None)
    with pytest.raises(UserError, match=r"^data.format: chat: the tokenizer has no chat template\n"):
        formatted(REWARD, tokenizer, "chat")


def changed(prompt: RewardTemplate, **parts: str) -> RewardTemplate:
    return RewardTemplate.parse({**prompt.model_dump(), **parts}, "here")


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        ("{{ raise_exception('no\nwords') }}", REWARD, r"the chat template refuses \['system', 'user'\]: no words"),
        ("{{ messages[0].content", REWARD, "the chat template refuses"),
        ("{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}", REWARD, "the chat template refuses"),
        ("{{ cycler.__init__.__globals__ }}", REWARD, "the chat template refuses .*unsafe"),
        ("You are a model.", REWARD, "the chat template leaves messages out"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", REWARD, "the chat template leaves messages out"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            changed(REWARD, no_proposal=" \n"),
            "no_proposal .* empty",
        ),
        (STYLES["ChatML"][0], changed(REWARD, event="<|im_start|>{event}"), "part event .* format of its own"),
    ],
)
def test_a_prompt_that_a_chat_template_cannot_write_is_refused_or_stays_plain(
    template: str, prompt: RewardTemplate, reason: str
) -> None:
    tokenizer = chat_tokenizer("ChatML", "GPT-2", ["a"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason) as refused:
        formatted(prompt, tokenizer, "chat")
    assert len(refused.value.what.splitlines()) == 1
    reason = refused.value.what.removeprefix("data.format: chat: ")
    assert formatted(prompt, tokenizer, "auto") == (prompt, None, f"plain, because {reason}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "otherwise",
        ),
        ("{% for m in messages %}{{ m.content }}!{% endfor %}", "without a special token"),
    ],
)
def test_an_answer_needs_a_template_that_asks_for_it_and_ends_it(template: str, reason: str) -> None:
    tokenizer = chat_tokenizer("ChatML", "GPT-2", ["a"])
    tokenizer.chat_template = template
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=reason):
        formatted(AGENT, tokenizer, "chat")


def test_todays_date_is_always_the_same() -> None:
    tokenizer = chat_tokenizer("ChatML", "GPT-2", ["a"])
    tokenizer.chat_template = "{{ strftime_now( \"%d %B\" ) }} {{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}"
    assert render_chat(tokenizer, [{"role": "user", "content": "!"}]) == "26 July 2024-07-26!"


def test_a_state_names_a_token_of_its_tokenizer() -> None:
    tokenizer = chat_tokenizer("ChatML", "GPT-2", ["a"])
    assert saved_chat({}, tokenizer) is saved_chat({"chat": None}, tokenizer) is None
    state = {"system": "", "user": "", "after": "", "end_token": "<|im_end|>", "lead": ""}
    assert saved_chat({"chat": state}, tokenizer) == Chat(**state)
    with pytest.raises(UserError, match="the tokenizer has no token <end>"):
        saved_chat({"chat": {**state, "end_token": "<end>"}}, tokenizer)
