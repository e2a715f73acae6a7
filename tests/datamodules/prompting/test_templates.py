"""Prompts: what a row becomes, that no text from the data can break it, and what truncation takes."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus
from datamodules.errors import UserError
from datamodules.prompting.segments import Data, Segment, SegmentTokenizer, truncate
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, render, training_text
from tests.datamodules.conftest import IMPOSTORS, few_examples, row_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT = RewardTemplate.read(DEFAULT_PROMPT)
PARTS = {
    "instructions": "Judge.\n",
    "event": "{time} {event}\n",
    "proposal": "Do {proposal}?\n",
    "no_proposal": "Nothing?\n",
}
SMALL = RewardTemplate.parse(PARTS, "here")
QUOTED = RewardTemplate.parse(
    {**PARTS, "event": "{time_json}: {event_json}\n", "proposal": "{proposal_json}\n"}, "here"
)
HOSTILE = st.lists(st.sampled_from(IMPOSTORS) | st.text(st.characters(codec="utf-8"), max_size=4), max_size=4).map(
    lambda pieces: "x" + "".join(pieces)
)
FAMILIES = pytest.mark.parametrize("family", ["scratch", "chat", "encoder", "unigram", "words", "pieces"])


def text_of(segment: Segment) -> str:
    return "".join(part.text if isinstance(part, Data) else part for part in segment)


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """All tokens with a meaning of their own; [UNK] is what an unknown character rightly becomes."""
    return set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


# Rendering


def test_row_becomes_instructions_events_in_order_and_the_proposal() -> None:
    assert [text_of(segment) for segment in render(SMALL, row_of(["first", "second"], "help"))] == [
        "Judge.\n",
        "0 first\n",
        "60 second\n",
        "Do help?\n",
    ]
    assert [text_of(segment) for segment in render(SMALL, row_of(["first"], None))][1:] == ["0 first\n", "Nothing?\n"]


def test_default_prompt_shows_events_and_proposal_and_ends_with_its_verdict_slot() -> None:
    offered, null = (render(DEFAULT, row_of(["first", "second"], proposal)) for proposal in ("help", None))
    assert offered[:-1] == null[:-1]
    assert ["first" in text_of(offered[1]), "second" in text_of(offered[2]), "help" in text_of(offered[3])] == [
        True
    ] * 3
    assert text_of(offered[3]).splitlines()[-1] == text_of(null[3]).splitlines()[-1]


@few_examples
@given(st.lists(HOSTILE, min_size=1, max_size=3), st.none() | HOSTILE, st.sampled_from([DEFAULT, SMALL, QUOTED]))
def test_text_from_data_never_starts_a_segment_or_a_line(
    events: list[str], proposal: str | None, template: RewardTemplate
) -> None:
    hostile = render(template, row_of(events, proposal))
    innocent = render(template, row_of(["x"] * len(events), None if proposal is None else "x"))
    assert len(hostile) == len(events) + 2
    for segment, model in zip(hostile, innocent, strict=True):
        assert [part for part in segment if isinstance(part, str)] == [part for part in model if isinstance(part, str)]
        assert len(text_of(segment).splitlines()) == len(text_of(model).splitlines())
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text_of(segment)), "a terminal would obey it"


@few_examples
@given(HOSTILE, HOSTILE)
def test_json_placeholders_contain_the_exact_text(event: str, proposal: str) -> None:
    _, shown, last = render(QUOTED, row_of([event], proposal))
    assert json.loads(text_of(shown).removeprefix('"0": ')) == event
    assert json.loads(text_of(last)) == proposal


def test_placeholders_in_the_data_are_not_filled() -> None:
    row = row_of(["{time} {event} {proposal}"], "{proposal} {event}")
    assert [text_of(segment) for segment in render(SMALL, row)[1:]] == [
        "0 {time} {event} {proposal}\n",
        "Do {proposal} {event}?\n",
    ]


# Tokens


@FAMILIES
@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_data_that_spells_a_special_token_gives_ordinary_tokens(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str, impostor: str
) -> None:
    """Also not where the template's own characters complete what the data began."""
    segmenter = SegmentTokenizer(tokenizers[family])
    bracketed = RewardTemplate.parse({**PARTS, "event": "<{event}> [{event}]", "proposal": "<{proposal}>"}, "here")
    texts = [f"x{impostor}", f"x {impostor} y", f"x{impostor}{impostor}", impostor.strip("<>[]")]
    for text in filter(str.strip, texts):
        for template in (DEFAULT, bracketed):
            for ids in segmenter.encode(render(template, row_of([text], text))):
                assert special_ids(tokenizers[family]).isdisjoint(ids), tokenizers[family].convert_ids_to_tokens(ids)


@FAMILIES
@few_examples
@given(event=HOSTILE, proposal=st.none() | HOSTILE)
def test_text_from_data_never_gives_special_tokens(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str, event: str, proposal: str | None
) -> None:
    segmenter = SegmentTokenizer(tokenizers[family])
    segments = render(SMALL, row_of([event], proposal))
    encoded = segmenter.encode(segments)
    assert len(encoded) == 3
    assert all(special_ids(tokenizers[family]).isdisjoint(ids) for ids in encoded)
    if family == "scratch":  # bytes in, bytes out: nothing is lost either
        assert [tokenizers[family].decode(ids) for ids in encoded] == [text_of(segment) for segment in segments]


@pytest.mark.parametrize(("family", "token"), [("scratch", "<eos>"), ("chat", "<|eot_id|>"), ("encoder", "[SEP]")])
def test_special_tokens_come_only_from_the_template(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str, token: str
) -> None:
    tokenizer = tokenizers[family]
    template = RewardTemplate.parse({**PARTS, "event": f"{token}{{event}}{token}"}, "here")
    (_, ids, _) = SegmentTokenizer(tokenizer).encode(render(template, row_of([f"a{token}b"])))
    number = tokenizer.convert_tokens_to_ids(token)
    assert [position for position, i in enumerate(ids) if i == number] == [0, len(ids) - 1]


def test_a_text_that_spells_a_control_token_is_split_there_only(
    tokenizers: "dict[str, PreTrainedTokenizerFast]",
) -> None:
    def tokens(family: str, text: str) -> list[str]:
        tokenizer = tokenizers[family]
        return tokenizer.convert_ids_to_tokens(SegmentTokenizer(tokenizer).encode([(Data(text),)])[0])

    assert tokens("unigram", "a</s>b") == ["▁", "a", "<", "/", "▁", "s", ">", "b"]
    assert tokens("unigram", "＜/s＞") == ["▁", "<", "/", "▁", "s", ">"]
    assert tokens("unigram", "<0x0a>") == ["▁", *"<0x0a>"]
    assert "<0x0A>" not in tokens("unigram", "<0x0A>")
    assert tokens("unigram", "é") == ["▁", "<0xC3>", "<0xA9>"], "other bytes are its right"
    assert tokens("pieces", "a [SEP] b") == ["a", "[", "##S", "E", "##P", "##]", "b"]
    assert tokens("pieces", "é") == ["[UNK]"], "so is an unknown word"
    assert tokens("words", 'the " x') == ["the", "<unk>", "x"]


def test_a_long_text_of_control_tokens_takes_linear_time(tokenizers: "dict[str, PreTrainedTokenizerFast]") -> None:
    segmenter = SegmentTokenizer(tokenizers["unigram"])
    encoded: list[int] = []
    plain = segmenter._plain

    class Counting:
        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            encoded.extend(map(len, texts))
            return plain.encode_batch(texts, **options)

    segmenter._plain = Counting()  # type: ignore[assignment]
    segmenter.encode([(Data("</s>" * 5000),)])
    assert sum(encoded) <= 2 * 20_000


def test_a_tokenizer_that_cannot_write_a_text_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "u": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="u")
    with pytest.raises(UserError, match="the tokenizer has 'u' as a special token"):
        SegmentTokenizer(tokenizer).encode([(Data("u"),)])


@pytest.mark.parametrize(("family", "prefix", "suffix"), [("scratch", 1, 0), ("chat", 1, 0), ("encoder", 1, 1)])
def test_prefix_and_suffix_are_those_that_the_tokenizer_adds(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", family: str, prefix: int, suffix: int
) -> None:
    segmenter = SegmentTokenizer(tokenizers[family])
    (ids,) = segmenter.encode([("Judge this.",)])
    assert (len(segmenter.prefix), len(segmenter.suffix)) == (prefix, suffix)
    assert [*segmenter.prefix, *ids, *segmenter.suffix] == tokenizers[family]("Judge this.").input_ids


@FAMILIES
def test_rows_that_share_a_history_share_its_tokens(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", embedded: Corpus, family: str
) -> None:
    """Also where one history goes on from the other: what a prefix tree is built on."""
    segmenter = SegmentTokenizer(tokenizers[family])
    trunks: dict[str, list[list[int]]] = {}
    for row in sorted(embedded.test[:200], key=lambda row: -len(row.history)):
        *trunk, _ = segmenter.encode(render(DEFAULT, row))
        longest = trunks.setdefault(row.scene, trunk)
        assert trunk == longest[: len(trunk)]


def test_training_text_is_every_distinct_segment_once() -> None:
    rows = [row_of(["a"], "b"), row_of(["a", "c"], None), row_of(["a"], "b")]
    assert training_text(SMALL, rows) == ["Judge.\n", "0 a\n", "Do b?\n", "60 c\n", "Nothing?\n"]


# Prompt files


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_prompt_file_of_the_user_replaces_ours(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(mark + "".join(f"{name}: {json.dumps(text)}\n" for name, text in PARTS.items()), encoding="utf-8")
    assert RewardTemplate.read(path) == SMALL


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "part top level"),
        (b"- instructions", "part top level"),
        (b"text", "part top level"),
        (b"instructions: x", "part event"),
        (json.dumps({**PARTS, "instructions": 3}).encode(), "part instructions"),
        (json.dumps({**PARTS, "no_proposal": None}).encode(), "part no_proposal"),
        (json.dumps({**PARTS, "verdict": "x"}).encode(), "part verdict"),
        (json.dumps({**PARTS, "instructions": "{event}"}).encode(), "part instructions: unknown placeholder {event}"),
        (json.dumps({**PARTS, "event": "so"}).encode(), "part event: does not say where the event stands"),
        (json.dumps({**PARTS, "proposal": "so"}).encode(), "part proposal: does not say where the proposal stands"),
        (json.dumps({**PARTS, "event": "{proposal}"}).encode(), "part event: unknown placeholder {proposal}"),
        (json.dumps({**PARTS, "proposal": "{task}"}).encode(), "part proposal: unknown placeholder {task}"),
        (json.dumps({**PARTS, "no_proposal": "{proposal}"}).encode(), "part no_proposal: unknown placeholder"),
        (
            json.dumps({**PARTS, "event": "{event} \ud83d"}).encode(),
            "half a surrogate pair, in line 1",
        ),
        (b"instructions: [", "is not YAML"),
        (b"instructions: \xff", "line 1: is not UTF-8"),
        (b"instructions: \x07", "is not YAML"),
        (b"instructions: !!python/object/apply:os.getcwd []", "is not YAML"),
        (b"instructions: 2024-13-45", "part event: Field required"),  # a text as any other
        (b"instructions: !!int x", "is not YAML"),
        (b"[" * 2_000, "is not YAML"),
    ],
    ids=range(21),
)
def test_bad_prompt_file_is_refused_by_name_and_part(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        RewardTemplate.read(path)
    assert caught.value.what.startswith(f"data.prompt: {path}")
    assert expected in caught.value.what
    assert len(str(caught.value).splitlines()) == 2


def test_a_surrogate_pair_in_yaml_becomes_one_character(tmp_path: Path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(json.dumps({**PARTS, "instructions": "\N{GRINNING FACE}"}))
    assert "\\ud83d\\ude00" in path.read_text()
    assert RewardTemplate.read(path).instructions == "\N{GRINNING FACE}"


def test_prompt_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match=r"data\.prompt: "):
            RewardTemplate.read(path)


# Truncation


@few_examples
@given(st.integers(0, 6), st.lists(st.integers(1, 6), max_size=6), st.integers(0, 6), st.integers(0, 40))
def test_truncation_drops_the_fewest_oldest_events(
    instructions: int, events: list[int], proposal: int, limit: int
) -> None:
    numbers = iter(range(1_000))
    segments = [[next(numbers) for _ in range(size)] for size in (instructions, *events, proposal)]
    ids, dropped = truncate(segments, limit)

    def without(count: int) -> list[int]:
        return [token for segment in (segments[0], *segments[1 + count :]) for token in segment]

    assert ids == without(dropped)
    fits = [count for count in range(len(events) + 1) if len(without(count)) <= limit]
    assert dropped == (fits[0] if fits else len(events))


def test_truncation_keeps_instructions_and_proposal() -> None:
    assert truncate([[1, 2], [3], [4], [5, 6]], 0) == ([1, 2, 5, 6], 2)
    assert truncate([[1, 2], [5, 6]], 3) == ([1, 2, 5, 6], 0)


def test_a_truncated_row_has_the_same_begin_and_end(
    tokenizers: "dict[str, PreTrainedTokenizerFast]", embedded: Corpus
) -> None:
    segmenter = SegmentTokenizer(tokenizers["scratch"])
    row: AnnotatedRow = max(embedded.test, key=lambda row: len(row.history))
    segments = segmenter.encode(render(DEFAULT, row))
    ids, dropped = truncate(segments, sum(map(len, segments)) - 1)
    assert dropped == 1
    shown = tokenizers["scratch"].decode(ids)
    assert shown == "".join(text_of(segment) for number, segment in enumerate(render(DEFAULT, row)) if number != 1)
