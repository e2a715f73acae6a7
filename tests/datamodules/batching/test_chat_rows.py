"""Data modules in chat format: their rows, their state, and that all of them ask an agent alike."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.batching.history_rows import HistoryDataModule
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.batching.prefix_tree import PrefixOrder
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.answers import Answer, write_answer
from datamodules.corpus.sources import load_corpus
from datamodules.errors import UserError
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, training_text
from tests.datamodules.prompting.chat_styles import chat_tokenizer
from tests.helpers import small_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM = "A user works at a computer. Judge whether this user would now accept the assistant's offer."
STAGES = ("train", "validation", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("backbone")
    text = training_text(RewardTemplate.read(DEFAULT_PROMPT), load_corpus("embedded").train[:200])
    chat_tokenizer("Llama 3", "Llama 3", text).save_pretrained(folder)
    return folder


def made(kind: type[Any], root: Path, backbone: Path, **options: Any) -> Any:
    data = kind(root=str(root), tokenizer=str(backbone), folds=3, batch_size=8, **{"cache": False, **options})
    data.setup("fit")
    return data


def ids_of_transformers(tokenizer: "PreTrainedTokenizerFast", user: Sequence[str], *answer: str) -> list[int]:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(user)}]
    template = str(tokenizer.chat_template).replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    found = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
    return list(found["input_ids"])


def test_every_row_has_the_token_ids_of_its_messages(root: Path, backbone: Path) -> None:
    """Rows that are too long keep the system message and the latest events."""
    data = made(RewardDataModule, root, backbone, max_length=170)
    truncated = 0
    for stage in STAGES:
        for row, found in zip(data.rows(stage), data.encoded[stage].input_ids, strict=True):
            offer = "No offer." if row.proposal is None else f"Offer: {row.proposal}"
            events = [f"- {event.event}" for event in row.history]
            rows = (
                ids_of_transformers(data.tokenizer, ["Events so far:", *events[dropped:], offer, "Accepted?"])
                for dropped in range(len(events) + 1)
            )
            found = found.tolist()
            kept = next(number for number, ids in enumerate(rows) if ids == found)
            truncated += kept > 0
            assert len(found) <= 170
    assert truncated == sum(data.truncated.values()) > 0


def test_a_tree_of_chats_saves_as_much_as_one_of_plain_rows(root: Path, backbone: Path) -> None:
    saved = {}
    for form in ("chat", "plain"):
        rows = made(RewardDataModule, root, backbone, format=form).encoded["train"].input_ids
        saved[form] = sum(map(len, rows)) / PrefixOrder(rows).tokens(range(len(rows)))
    assert saved["chat"] > 0.9 * saved["plain"] > 1


def test_a_module_in_chat_format_is_rebuilt_from_its_state(root: Path, backbone: Path) -> None:
    for kind in (RewardDataModule, AgentDataModule):
        data = made(kind, root, backbone)
        again = kind.from_state(json.loads(json.dumps(data.state_dict())))
        again.setup("test")
        assert data.chat is not None
        assert (again.chat, again.template, again.end) == (data.chat, data.template, data.end)
        assert again.encoded["test"].digest == data.encoded["test"].digest
    other = RewardDataModule.from_state(made(RewardDataModule, root, backbone).state_dict(), prompt=str(DEFAULT_PROMPT))
    assert other.template == made(RewardDataModule, root, backbone).template


def test_a_state_of_an_earlier_version_means_plain(root: Path, backbone: Path) -> None:
    plain = made(AgentDataModule, root, backbone, format="plain")
    state = plain.state_dict()
    del state["chat"], state["hyperparameters"]["format"]
    again = AgentDataModule.from_state(state)
    again.setup("test")
    assert again.chat is None
    assert again.encoded["test"].digest == plain.encoded["test"].digest
    assert again.end == [again.tokenizer.eos_token_id]
    made(AgentDataModule, root, backbone, format="plain").load_state_dict(state)
    with pytest.raises(UserError, match=r"the prompt or its format differs .*\n.* data.format"):
        made(AgentDataModule, root, backbone).load_state_dict(state)


def test_plain_rows_do_not_depend_on_a_chat_template(root: Path, backbone: Path, tmp_path: Path) -> None:
    with_template = made(RewardDataModule, root, backbone, format="plain")
    tokenizer = with_template.tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    without = made(RewardDataModule, root, tmp_path)
    assert without.chat is None
    assert without.encoded["train"].digest == with_template.encoded["train"].digest


def test_answers_end_with_the_token_of_the_chat_template(root: Path, backbone: Path) -> None:
    data = made(AgentDataModule, root, backbone)
    end = data.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert data.end == [end] != [data.tokenizer.eos_token_id]
    for example, ids, learned in zip(
        data.rows("train"), data.encoded["train"].input_ids, data.encoded["train"].answers, strict=True
    ):
        text = data.tokenizer.decode([ids[place] for place in learned])
        assert text == f"{write_answer(Answer(proposal=example.proposal))}<|eot_id|>"


def test_agents_of_all_trainings_are_asked_alike(root: Path, backbone: Path) -> None:
    agent, preference, online = (
        made(kind, root, backbone) for kind in (AgentDataModule, PreferenceDataModule, HistoryDataModule)
    )
    example = agent.rows("train")[0]
    prompt = [token for segment in agent.segments(example.history) for token in segment] + agent.generation_prompt()
    assert online.prompt(example.history) == prompt
    assert preference.segments(example.history) == agent.segments(example.history)
    assert (
        (preference.generation_prompt(), preference.end)
        == (agent.generation_prompt(), agent.end)
        == (online.generation_prompt(), online.end)
    )
    ids = agent.encoded["train"].input_ids[0]
    assert ids[: len(prompt)].tolist() == prompt


def test_an_agent_in_chat_format_also_learns_conversations(root: Path, backbone: Path, tmp_path: Path) -> None:
    """Both in the format of the chat template, without a second token that begins a text."""
    turns = [{"role": "user", "content": "I open a file."}, {"role": "assistant", "content": "Shall I read it?"}]
    path = tmp_path / "told.json"
    path.write_text(json.dumps([{"conversations": turns}] * 2 + [{"conversations": turns[:1] * 2 + turns[1:]}] * 20))
    data = made(AgentDataModule, root, backbone, conversations=[str(path)])
    rows = data.encoded["train"].input_ids
    begin = data.tokenizer.convert_tokens_to_ids(["<s>", "<|start_header_id|>"])
    assert len(rows) > len(data.rows("train"))
    assert all(list(ids[:2]) == begin for ids in rows)


def test_a_run_says_if_its_tokens_are_not_those_of_the_whole_text(
    root: Path, backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a tokenizer that joins the end of a line and the beginning of the next one."""
    lines = ["\n".join(f"- {event.event}" for event in row.history) for row in load_corpus(str(root)).rows[:100]]
    chat_tokenizer("ChatML", "whole", ["\n- "] * 5000 + lines).save_pretrained(tmp_path)
    notes = {}
    for folder in (backbone, tmp_path):
        caplog.clear()
        with caplog.at_level("INFO", "proactive"):
            made(RewardDataModule, root, folder)
        notes[folder] = [line for line in caplog.messages if line.startswith("data.format")]
    assert notes[backbone] == ["data.format: chat"]
    assert notes[tmp_path] == [
        "data.format: chat",
        "data.format: 32 of 32 rows have other token ids than apply_chat_template gives",
    ]


@pytest.mark.parametrize("answers", [True, False])
def test_equal_texts_of_both_formats_are_cached_apart(
    root: Path, backbone: Path, tmp_path: Path, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt file that spells the chat format is plain: a token that begins a text stands before it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    kind = AgentDataModule if answers else RewardDataModule
    chat = made(kind, root, backbone, cache=True)
    (tmp_path / "own.yaml").write_text(json.dumps(chat.template.model_dump()))
    plain = made(kind, root, backbone, cache=True, prompt=str(tmp_path / "own.yaml"))
    assert plain.chat is None
    assert plain.template == chat.template
    expected = made(kind, root, backbone, prompt=str(tmp_path / "own.yaml"))
    assert plain.encoded["train"].token_digest == expected.encoded["train"].token_digest
