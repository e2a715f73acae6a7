"""Whatever a network prefers, what it writes under the grammar is an answer."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from datamodules.corpus.answers import ANSWER_SCHEMA, FIELDS, Answer, read_answer, write_answer
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import train_tokenizer
from models.decoding.generation import generate_answers
from models.decoding.grammar import AnswerGrammar, _unpacked
from tests.models.networks.test_tree_reading import SMALL

ANSWERS = [
    Answer(proposal=None),
    Answer(proposal="Offer to write the test"),
    Answer(purpose="to mend “it”", thoughts="a\nb \\ c", proposal="Ünïcödé 😀", response="Shall I?"),
    Answer(thoughts='"proposal": null}', proposal=None, response="{}"),
]


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer([write_answer(answer) for answer in ANSWERS] * 3, 330)


def with_spaces_for_words() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: words begin with a mark, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    model.train_from_iterator([write_answer(answer) for answer in ANSWERS] * 3, trainer)
    state = json.loads(model.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    model = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level(), "with spaces for words": with_spaces_for_words()}
GRAMMARS = {name: AnswerGrammar(made, made.eos_token_id) for name, made in TOKENIZERS.items()}
LED = {name: AnswerGrammar(made, made.eos_token_id, " ") for name, made in TOKENIZERS.items()}
both = pytest.mark.parametrize("kind", TOKENIZERS)


def assert_answer(text: str) -> None:
    """Strictly what the schema says, in the style of `write_answer`, and read as it stands."""
    content = json.loads(text)
    assert json.dumps(content, ensure_ascii=False) == text or "\\" in text
    assert content.keys() <= ANSWER_SCHEMA["properties"].keys()
    assert [name for name in FIELDS if name in content] == list(content)
    assert all(isinstance(value, str) for name, value in content.items() if name != "proposal")
    assert content["proposal"] is None or (isinstance(content["proposal"], str) and content["proposal"])
    proposal = content["proposal"]
    if proposal is not None and not any(map(str.isalnum, proposal)):
        return  # chance can write a text that offers nothing, such as "?"; what is read of it is the reader's matter
    read = read_answer(text)
    assert read is not None
    assert read.purpose == content.get("purpose", "").encode("utf-8", "replace").decode()


@both
def test_the_grammar_allows_what_write_answer_writes(kind: str) -> None:
    grammar, tokenizer = GRAMMARS[kind], TOKENIZERS[kind]
    for answer in ANSWERS:
        matcher = grammar.start()
        whole = [False]
        for token in grammar._tokenizer.tokenize_str(write_answer(answer)):
            assert grammar.allowed([matcher], len(tokenizer))[0, token]
            whole.append(grammar.advance(matcher, token))
        assert whole.index(True) == len(whole) - 1


@both
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_answers_can_begin_with_white_space(kind: str, seed: int) -> None:
    """Also those that are cut off."""
    grammar, tokenizer = LED[kind], TOKENIZERS[kind]
    random, matcher, written = np.random.default_rng(seed), grammar.start(), list[int]()
    for _ in range(int(random.integers(0, 60))):
        allowed = grammar.allowed([matcher], len(tokenizer))[0]
        allowed[tokenizer.eos_token_id] = False
        written.append(int(random.choice(torch.nonzero(allowed)[:, 0].numpy())))
        if grammar.advance(matcher, written[-1]):
            break
    closed = grammar.close(written)
    text = grammar._tokenizer.decode_str(closed)
    assert text.startswith(" {")
    assert_answer(text[1:])


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_random_weights_with_a_grammar_give_valid_answers(kind: str, temperature: float) -> None:
    tokenizer = TOKENIZERS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SMALL, "vocab_size": len(tokenizer) + 11})
    network = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(network.lm_head.weight, std=0.5)
    traces = [[[5, 6], *[[7 + n + 3 * k, 9] for k in range(4)]] for n in range(4)]
    finished = 0
    for new in (1, 6, 25, 90):
        options: Any = {"end_id": tokenizer.eos_token_id, "max_new_tokens": new, "grammar": GRAMMARS[kind]}
        options |= {"candidates": 5 if temperature else 1, "temperature": temperature}
        for answer in generate_answers(network, traces, [8], **options):
            assert_answer(tokenizer.decode(answer.token_ids))
            finished += answer.finished
    assert finished or not temperature


@both
@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_random_walk_through_the_grammar_can_be_closed_at_any_token(kind: str, seed: int) -> None:
    grammar, tokenizer = GRAMMARS[kind], TOKENIZERS[kind]
    random = np.random.default_rng(seed)
    matcher, written = grammar.start(), list[int]()
    for _ in range(int(random.integers(0, 60))):
        allowed = grammar.allowed([matcher], len(tokenizer))[0]
        allowed[tokenizer.eos_token_id] = False
        written.append(int(random.choice(torch.nonzero(allowed)[:, 0].numpy())))
        if grammar.advance(matcher, written[-1]):
            assert grammar.close(written) == written
            break
    assert_answer(tokenizer.decode(grammar.close(written)))


@pytest.mark.parametrize(
    ("written", "closed"),
    [
        ("", '{"proposal": null}'),
        ('{"pur', '{"proposal": null}'),
        ('{"purpose": "to mend', '{"purpose": "to mend", "proposal": null}'),
        ('{"purpose": "to mend", "thou', '{"purpose": "to mend", "proposal": null}'),
        ('{"purpose": "to mend \\', '{"purpose": "to mend ", "proposal": null}'),
        ('{"proposal": n', '{"proposal": null}'),
        ('{"proposal": "', '{"proposal": null}'),
        ('{"proposal": "Write', '{"proposal": "Write"}'),
        ('{"proposal": null', '{"proposal": null}'),
        ('{"proposal": "Write", "resp', '{"proposal": "Write"}'),
        ('{"proposal": null, "response": "S', '{"proposal": null, "response": "S"}'),
        ('{"proposal": "Write"}', '{"proposal": "Write"}'),
    ],
)
@both
def test_closing_a_truncated_answer_keeps_its_tokens(kind: str, written: str, closed: str) -> None:
    grammar = GRAMMARS[kind]
    ids = grammar._tokenizer.tokenize_bytes(written.encode())
    assert grammar._tokenizer.decode_str(grammar.close(ids)) == closed


def test_closing_drops_half_a_character() -> None:
    tokenizer, grammar = TOKENIZERS["byte-level"], GRAMMARS["byte-level"]
    cut = grammar._tokenizer.tokenize_bytes(b'{"proposal": "Go ' + "é".encode()[:1])
    assert tokenizer.decode(grammar.close(cut)) == '{"proposal": "Go "}'


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(UserError, match="cannot be held to JSON with this tokenizer"):
        AnswerGrammar(tokenizer, 1)


def test_bits_are_unpacked_on_a_device_as_numpy_does() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    expected = np.unpackbits(packed, axis=1, count=51, bitorder="little").astype(bool)
    assert np.array_equal(_unpacked(torch.from_numpy(packed), 51).numpy(), expected)
