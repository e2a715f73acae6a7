"""Tokenizers: trained on a run's text, loaded from a folder, and carried as plain text."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import datamodules.prompting.tokenizers
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import load_tokenizer, tokenizer_from_state, tokenizer_state, train_tokenizer
from tests.datamodules.conftest import IMPOSTORS, few_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = ["The user opens a file.", "The user opens another file.", "Offer: explain the error."]
FAMILIES = pytest.mark.parametrize("family", ["scratch", "chat", "encoder"])


@few_examples
@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_trained_tokenizer_encodes_every_text(tokenizers: "dict[str, PreTrainedTokenizerFast]", text: str) -> None:
    tokenizer = tokenizers["scratch"]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text
    assert set(ids).isdisjoint(tokenizer.all_special_ids)


@pytest.mark.parametrize("size", [259, 280])
def test_a_trained_tokenizer_has_at_most_the_given_size(size: int) -> None:
    tokenizer = train_tokenizer(TEXT * 5, size)
    assert len(tokenizer) == size
    assert tokenizer_state(tokenizer) == tokenizer_state(train_tokenizer(TEXT * 5, size))
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    if size > 259:
        assert tokenizer_state(tokenizer) != tokenizer_state(train_tokenizer(["zzz yyy"] * 5, size))


@pytest.mark.parametrize("size", [258, 0, -1])
def test_vocabulary_too_small_for_every_byte_is_refused(size: int) -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer(TEXT, size)
    assert caught.value.what == f"data.vocabulary_size: {size} is too small"
    assert "259" in caught.value.hint


@FAMILIES
def test_state_is_plain_and_rebuilds_the_tokenizer(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str
) -> None:
    original = tokenizers[family]
    state = tokenizer_state(original)
    rebuilt = tokenizer_from_state(json.loads(json.dumps(state)))
    assert tokenizer_state(rebuilt) == state
    assert rebuilt.padding_side == "right"
    assert rebuilt.chat_template == original.chat_template
    assert rebuilt.special_tokens_map == original.special_tokens_map
    for text in (*TEXT, *IMPOSTORS, "".join(IMPOSTORS)):
        assert rebuilt(text).input_ids == original(text).input_ids
        split, again = (t(text, split_special_tokens=True).input_ids for t in (original, rebuilt))
        assert split == again


@FAMILIES
def test_saved_folder_is_loaded(tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str, tmp_path: Path) -> None:
    tokenizers[family].save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("The user <pad> [SEP] x").input_ids == tokenizers[family]("The user <pad> [SEP] x").input_ids
    assert loaded.pad_token == tokenizers[family].pad_token
    assert loaded.padding_side == "right"
    rebuilt = tokenizer_from_state(tokenizer_state(loaded))
    assert rebuilt("The user [SEP]").input_ids == loaded("The user [SEP]").input_ids


def _saved(folder: Path, **special: str) -> str:
    from transformers import PreTrainedTokenizerFast

    bare = train_tokenizer(TEXT, 280).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=bare, padding_side="left", **special).save_pretrained(folder)
    return str(folder)


def test_of_several_chat_templates_the_default_one_is_used(tmp_path: Path) -> None:
    """A checkpoint contains this one."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(_saved(tmp_path, eos_token="<eos>"))
    saved.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    saved.save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path).chat_template, dict)
    assert tokenizer_state(load_tokenizer(str(tmp_path)))["chat_template"] == "{{ messages[0].content }}"


def test_without_a_padding_token_the_end_token_pads(tmp_path: Path) -> None:
    loaded = load_tokenizer(_saved(tmp_path, eos_token="<eos>"))
    assert (loaded.pad_token, loaded.padding_side) == ("<eos>", "right")


def test_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_tokenizer(_saved(tmp_path, bos_token="<bos>"))


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match="is not a fast one"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", '{"tokenizer_class": "NoSuchTokenizer"}'])
def test_folder_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.what.startswith(f"cannot load the tokenizer of {tmp_path}: ")


def test_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    path = Path(_saved(tmp_path, eos_token="<eos>"), "tokenizer.json")
    path.write_text(path.read_text()[:-500])
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_tokenizer_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    """The payload only leaves a file behind."""
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import ByT5Tokenizer\nclass Own(ByT5Tokenizer):\n    pass\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("text", ["[" * 1_000_000, " " * 1_000_000, "ab" * 500_000])
def test_a_word_of_any_length_can_be_trained_on(text: str) -> None:
    """Whole, it would take hours."""
    tokenizer = train_tokenizer([text], 400)
    assert tokenizer.decode(tokenizer(text[:50], add_special_tokens=False).input_ids) == text[:50]


def test_texts_of_ordinary_words_are_not_split_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXT, " ".join(TEXT * 100), "word" * 249]
    cut = tokenizer_state(train_tokenizer(texts, 300))
    monkeypatch.setattr(datamodules.prompting.tokenizers, "_LONG_RUN", re.compile("(?!)"))
    assert tokenizer_state(train_tokenizer(texts, 300)) == cut


def test_a_tokenizer_folder_with_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json: is a named pipe"):
        load_tokenizer(str(tmp_path))
