"""AgentDataModule: which answers are learned, what is asked of histories, and that no tested scene is learned."""

import json
import logging
from collections.abc import Iterator
from copy import deepcopy
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from datamodules.batching import token_cache as cache_module
from datamodules.batching.answer_rows import AgentDataModule, AnswerKind, probes
from datamodules.batching.steps import AgentBatch
from datamodules.corpus.answers import read_answer
from datamodules.corpus.records import Category, scene_of
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import Split
from datamodules.errors import UserError
from datamodules.prompting.conversation_tokenizer import ConversationTokenizer
from datamodules.prompting.segments import truncate
from datamodules.prompting.tokenizers import tokenizer_from_state, tokenizer_state
from tests.datamodules.conftest import row_of
from tests.helpers import PROACTIVEBENCH, needs_proactivebench, small_root, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batches = list[AgentBatch]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), scenes=9, rows_per_scene=20)


def made(root: Path | str, stage: str = "fit", **options: Any) -> AgentDataModule:
    data = AgentDataModule(**{"root": str(root), "folds": 3, "vocabulary_size": 400, "batch_size": 8, **options})
    data.setup(stage)
    data.choose_layout(None)
    return data


def conversations_file(path: Path, *contents: str) -> str:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Fine."}] for text in contents]
    path.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    return str(path)


def test_only_accepted_proposals_and_correct_silences_are_learned(root: Path) -> None:
    data = made(root)
    expected = {
        (row.history, row.proposal, row.proposal is None)
        for row in data.split.train
        if row.category in (Category.CORRECT_DETECTION, Category.NON_RESPONSE)
    }
    learned = [(e.history, e.proposal, e.kind == AnswerKind.NULL) for e in data.rows("train")]
    assert len(learned) == len(set(learned))
    assert set(learned) == expected
    assert {kind for _, _, kind in learned} == {True, False}


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_the_learned_tokens_are_the_answer_and_its_end(root: Path, layout: Any) -> None:
    data = made(root, layout=layout)
    examples = data.rows("train")
    seen = []
    for step in data.train_dataloader():
        total = 0.0
        for batch in step:
            answers = batch["answers"]
            for number, row in enumerate(batch["row"].tolist()):
                tokens = answers["target"][answers["pair_token"][answers["pair_row"] == number]]
                text = data.tokenizer.decode(tokens)
                answer = read_answer(text)
                assert text.endswith("}<eos>")
                assert answer is not None
                assert answer.proposal == examples[row].proposal
                seen.append(row)
            total += float((batch["weight"][answers["pair_row"]]).sum())
        assert total == pytest.approx(1.0), "a step's loss is the mean over its answers' tokens"
    assert sorted(seen) == list(range(len(examples)))


def test_each_validation_history_has_one_probe_after_the_choice(root: Path) -> None:
    data = made(root)
    probes = [e for e in data.rows("validation") if e.kind == AnswerKind.PROBE]
    assert {e.history for e in probes} == {row.history for row in data.split.validation}
    assert len(probes) == len({e.history for e in probes})
    needed = {row.history: row.help_needed for row in data.split.validation}
    assert all(e.help_needed is needed[e.history] for e in probes)
    encoded = data.encoded["validation"]
    place = data.rows("validation").index(probes[0])
    assert encoded.answers is not None
    assert data.tokenizer.decode(encoded.input_ids[place][encoded.answers[place]]) == " null}<eos>"
    assert encoded.columns["help_needed"][place] == int(bool(probes[0].help_needed))


def test_without_help_needed_the_judgments_decide_whether_help_was_needed(root: Path) -> None:
    rows = [row.model_copy(update={"help_needed": None}) for row in load_corpus(str(root)).train]
    said = {probe.history: probe.help_needed for probe in probes(rows)}
    for row in rows:
        if row.category in (Category.MISSED_NEED, Category.CORRECT_DETECTION) and row.history in said:
            same = [other for other in rows if other.history == row.history]
            if all(other.category != Category.NON_RESPONSE for other in same):
                assert said[row.history] is True
    assert {row.history for row in rows if row.category != Category.FALSE_ALARM} == set(said)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("A", True, True), ("B", True, True), ("C", False, False)], True),
        ([("A", True, False), ("B", False, False), ("C", True, True)], False),
        ([("A", True, True), ("B", False, False)], None),  # as many as not: not known
        ([("A", True, True), ("B", False, False), (None, True, None)], False),
        ([(None, False, None), ("A", False, None)], True),
        ([(None, True, None), ("A", True, None)], False),  # null was right, though an offer was welcome
        ([("A", True, None)], True),
        ([("A", False, None)], None),
    ],
)
def test_the_majority_of_rows_decides_whether_help_was_needed(rows: list[Any], expected: bool | None) -> None:
    given = [row_of(["It rains."], proposal, accepted, help_needed=needed) for proposal, accepted, needed in rows]
    other = row_of(["It rains.", "It pours."], None, True)
    for order in permutations(given):
        found = {probe.history: probe.help_needed for probe in probes([*order, other])}
        assert found.pop(other.history) is False
        assert found == ({} if expected is None else {given[0].history: expected})


@pytest.mark.parametrize("split", ["by_scene", "published"])
def test_tested_scenes_are_not_learned(split: Any) -> None:
    data = made("embedded", split=split)
    tested = {row.scene for row in data.split.test}
    learned = {scene_of(e.history) for e in data.rows("train")}
    assert tested
    assert not tested & (learned | {row.scene for row in data.split.validation})
    assert data.state_dict()["training_scenes"] == sorted({row.scene for row in data.split.train})
    assert data.contamination.contaminated_rows == 0


@needs_proactivebench
def test_the_published_split_learns_from_the_four_scenes_outside_the_test_traces() -> None:
    data = made(PROACTIVEBENCH, split="published")
    traces = load_corpus(str(PROACTIVEBENCH)).traces.values()
    tested = {scene_of([step.observation for step in steps]) for steps in traces}
    assert len(tested) == 12
    assert {row.scene for row in data.split.test} == tested
    learned = {row.scene for row in data.split.train}
    assert (len(learned), len({row.scene for row in data.split.validation})) == (3, 1)
    assert not learned & tested


def test_training_on_tested_scenes_needs_an_option_and_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="proactive"):
        logging.getLogger("proactive").propagate = True
        data = made(root, allow_contamination=True)
    assert data.contamination.fraction == 1.0
    assert data.contamination_allowed
    assert "contaminated: data.allow_contamination" in caplog.text


def test_a_root_whose_scenes_are_all_tested_is_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match="published needs the traces"):
        made(root, split="published")


def test_conversations_are_learned_beside_the_rows_and_some_are_held_out(root: Path, tmp_path: Path) -> None:
    path = conversations_file(tmp_path / "told.json", *(f"Conversation number {n}." for n in range(60)))
    data = made(root, conversations=[path], validation_fraction=0.3)
    kinds = {stage: data.encoded[stage].columns["kind"] for stage in ("train", "validation", "test")}
    told = {stage: int((kind == AnswerKind.CONVERSATION).sum()) for stage, kind in kinds.items()}
    assert told["train"] + told["validation"] == 60
    assert told["test"] == 0
    assert 5 < told["validation"] < 35
    alone = made(root, conversations=[path], annotated=False, validation_fraction=0.3)
    assert set(alone.encoded["train"].columns["kind"].tolist()) == {AnswerKind.CONVERSATION}
    assert alone.steps_per_epoch == -(-told["train"] // 8)
    answers = [
        alone.tokenizer.decode(batch["answers"]["target"][batch["answers"]["pair_token"]])
        for step in alone.train_dataloader()
        for batch in step
    ]
    assert "".join(answers).count("Fine.<eos>") == told["train"]


@pytest.mark.parametrize("cached", [True, False])
def test_conversations_with_a_tested_event_are_left_out(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: bool
) -> None:
    event = made(root).split.test[0].history[-1].event
    path = conversations_file(tmp_path / "told.json", "Harmless talk.", json.dumps({"Event": event}), "More talk.")
    options: dict[str, Any] = {"conversations": [path], "validation_fraction": 0.0, "annotated": True, "cache": cached}
    for _ in range(2):  # also when the cache remembers
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="proactive"):
            logging.getLogger("proactive").propagate = True
            data = made(root, **options)
        assert "conversations left out: 1 with events of test scenes" in caplog.text
        assert int((data.encoded["train"].columns["kind"] == AnswerKind.CONVERSATION).sum()) == 2
    allowed = made(root, **options, allow_contamination=True)
    assert int((allowed.encoded["train"].columns["kind"] == AnswerKind.CONVERSATION).sum()) == 3


def test_texts_that_the_chat_format_changes_are_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizers: "dict[str, PreTrainedTokenizerFast]"
) -> None:
    tokenizer = deepcopy(tokenizers["chat"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'].split('</think>')[-1] }}<|eot_id|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    answers = ["Fine.", "hm</think>Fine.", "only a thought</think>"]
    told = [[("user", f"Talk {number}."), ("assistant", answer)] for number, answer in enumerate(answers)]
    records = [{"conversations": [{"role": role, "content": text} for role, text in turns]} for turns in told]
    (tmp_path / "told.json").write_text(json.dumps(records))
    options: dict[str, Any] = {"conversations": [str(tmp_path / "told.json")], "validation_fraction": 0.0}
    for _ in range(2):  # also when the cache remembers
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="proactive"):
            logging.getLogger("proactive").propagate = True
            data = made(root, tokenizer=str(tmp_path / "tokenizer"), **options)
        assert "conversations left out: 1 whose last answer is empty in the chat format" in caplog.text
        assert "conversations whose texts the chat format changes: 2" in caplog.text
        assert int((data.encoded["train"].columns["kind"] == AnswerKind.CONVERSATION).sum()) == 2


def test_what_was_converted_is_logged_for_both_splits_together(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roles = ({"role": "user", "content": f"Talk {n}."} for n in range(20))
    records = [{"messages": [one, {"role": "assistant", "content": "Fine."}]} for one in roles]
    records.append({"messages": [{"role": "user", "content": "Talk."}, {"role": "tool", "content": "r"}]})
    path = tmp_path / "told.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for _ in range(2):  # also when the cache remembers
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="proactive"):
            logging.getLogger("proactive").propagate = True
            data = made(root, conversations=[str(path)], validation_fraction=0.4)
        counts = [
            int((data.encoded[s].columns["kind"] == AnswerKind.CONVERSATION).sum()) for s in ("train", "validation")
        ]
        assert sum(counts) == 20
        assert all(counts)
        assert (
            "data.conversations: 21 conversations converted from OpenAI; 40 of 42 turns kept; "
            "turns dropped: 1 that call a tool or answer a call; 1 conversations left out, because no answer is left\n"
        ) in caplog.text
        assert "conversations left out:" not in caplog.text


@pytest.mark.parametrize("annotated", [True, False])
def test_with_contamination_allowed_all_scenes_count_as_trained_on(root: Path, tmp_path: Path, annotated: bool) -> None:
    """Each scene is either kept out of the conversations, those of validation too, or named as trained on."""
    plain = made(root)
    scenes = {row.scene: row.history[-1].event for row in load_corpus(str(root)).rows}
    harmless = [f"Harmless talk, number {n}." for n in range(30)]
    path = conversations_file(tmp_path / "told.json", *harmless, *scenes.values())
    options: dict[str, Any] = {"conversations": [path], "validation_fraction": 0.2, "annotated": annotated}
    data = made(root, **options)
    known = set(data.state_dict()["training_scenes"])
    assert known == {row.scene for row in plain.split.train}
    held_out = {event.event for row in load_corpus(str(root)).rows if row.scene not in known for event in row.history}
    told = data.tokenizer.batch_decode(list(data.encoded["train"].input_ids))
    turns = [text for text in told if "user: " in text]
    assert not [event for event in held_out for text in turns if len(event) >= 20 and event in text]
    allowed = made(root, **options, allow_contamination=True)
    assert set(allowed.state_dict()["training_scenes"]) == set(scenes)


def test_a_resumed_run_needs_the_same_conversations(root: Path, tmp_path: Path) -> None:
    one, other = (conversations_file(tmp_path / name, "Talk.", name) for name in ("one.json", "other.json"))
    state = made(root, conversations=[one]).state_dict()
    made(root, conversations=[one]).load_state_dict(state)
    with pytest.raises(UserError, match="training rows differ"):
        made(root, conversations=[other]).load_state_dict(state)


def test_the_same_conversations_in_another_format_are_the_same_rows(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = conversations_file(tmp_path / "told.json", "Talk.", "More talk.")
    records = [{**record, "source": "x"} for record in json.loads(Path(lines).read_text())]
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, record in enumerate(records):
        parquet.write_table(pyarrow.Table.from_pylist([record]), folder / f"train-{number}.parquet")
    state = made(root, conversations=[lines]).state_dict()
    with caplog.at_level(logging.INFO, logger="proactive"):
        logging.getLogger("proactive").propagate = True
        made(root, conversations=[str(folder)]).load_state_dict(state)
    assert f"data.conversations: {folder}/train-1.parquet: columns not read: source" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotated": False}, "leaves no training data"),
        ({"conversations": ["nothing.json"]}, "nothing.json: No such file"),
        ({"max_length": 30}, "instructions and answer of row"),
    ],
)
def test_skipped_conversations_are_logged(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(root, **options)


def test_a_test_split_without_probes_is_refused_before_training(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejected offer does not say whether help was needed."""
    split = made(root).split
    undecided = Split(split.train, split.validation, [row_of(["another scene"], "Help.", False)])
    monkeypatch.setattr(AgentDataModule, "divide", lambda data, corpus: undecided)
    with pytest.raises(UserError, match="no history of the test split says whether help was needed"):
        made(root)


def test_long_histories_lose_their_oldest_events(root: Path) -> None:
    whole = made(root)
    longest = max(map(len, whole.encoded["train"].input_ids))
    data = made(root, max_length=longest - 1)
    assert data.truncated["train"] > 0
    assert max(map(len, data.encoded["train"].input_ids)) < longest
    begin = whole.segments(())[0]
    assert all(ids[: len(begin)].tolist() == begin for ids in data.encoded["train"].input_ids)


def test_the_number_of_events_read_does_not_depend_on_the_answer(tmp_path: Path) -> None:
    """Nor from whether it is learned or asked for; and an agent that answers later reads the same."""
    rows = load_corpus(str(small_root(tmp_path / "small", scenes=9, rows_per_scene=20))).rows
    longer = [row.model_copy(update={"proposal": row.proposal and row.proposal * 2}) for row in rows]
    write_jsonl(tmp_path / "long" / "reward_data" / "train_data.jsonl", rows + longer)
    whole = made(tmp_path / "long")
    limit = len(whole.segments(())[0]) + whole.branch_length + 50
    data = made(tmp_path / "long", max_length=limit)
    again = AgentDataModule.from_state(json.loads(json.dumps(data.state_dict())))
    assert again.prompt_length == data.prompt_length
    assert sum(data.truncated.values()) > 0
    for stage in ("train", "validation", "test"):
        for example, ids in zip(data.rows(stage), data.encoded[stage].input_ids, strict=True):  # type: ignore[arg-type]
            opening, answer = data.segmenter.encode(data.branch(example))
            prompt = [*truncate([*data.segments(example.history), opening], again.prompt_length)[0]]
            assert ids.tolist() == [*prompt, *answer, data.tokenizer.eos_token_id]
            assert len(ids) <= limit


def test_cached_rows_depend_on_the_chat_template(
    root: Path, tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = conversations_file(tmp_path / "told.json", *(f"Talk {number}." for number in range(20)))
    templates = [
        None,
        "{% for m in messages %}{{ m.role }}! {{ m.content }}<eos>{% endfor %}",
        "{% for m in messages %}{{ m.role }}? {{ m.content }}<eos>{% endfor %}",
    ]
    texts, states = [], []
    for number, template in enumerate(templates):
        tokenizer = tokenizer_from_state({**tokenizer_state(tokenizers["scratch"]), "chat_template": template})
        tokenizer.save_pretrained(folder := tmp_path / str(number))
        options: dict[str, Any] = {"conversations": [path], "annotated": False, "tokenizer": str(folder)}
        for data in (made(root, **options), made(root, **options)):
            texts.append(data.tokenizer.decode(data.encoded["train"].input_ids[0]))
        states.append(data.state_dict())
    starts = ("<bos>user: Talk", "user! Talk", "user? Talk")
    assert [text.startswith(start) for text, start in zip(texts[::2], starts, strict=True)] == [True] * 3
    assert texts[::2] == texts[1::2]
    with pytest.raises(UserError, match="the tokenizer, or its chat template, differs"):
        data.load_state_dict(states[1])
    monkeypatch.setattr(cache_module, "code_digest", lambda: "other code")
    with monkeypatch.context() as patch:
        patch.setattr(ConversationTokenizer, "encode", lambda *args: ([1, 2, 3], [2]))
        other = made(root, **options)
        assert list(other.encoded["train"].input_ids[0]) == [1, 2, 3]
    with pytest.raises(UserError, match="the training rows differ"):
        other.load_state_dict(states[2])


def test_a_resumed_run_holds_out_the_same_conversations(root: Path, tmp_path: Path) -> None:
    path = conversations_file(tmp_path / "told.json", *(f"Talk {number}." for number in range(40)))
    state = made(root, conversations=[path]).state_dict()
    with pytest.raises(UserError, match=r"data.validation_fraction: 0.3, but the checkpoint's run has 0.1"):
        made(root, conversations=[path], validation_fraction=0.3).load_state_dict(state)
    moved = (tmp_path / "told.json").rename(tmp_path / "moved.json")
    made(root, conversations=[str(moved)]).load_state_dict(state)


def test_rows_begin_with_the_segments_of_the_history_and_the_generation_prompt(root: Path) -> None:
    data = made(root)
    for example, ids in zip(data.rows("train"), data.encoded["train"].input_ids, strict=True):
        prompt = [token for segment in data.segments(example.history) for token in segment] + data.generation_prompt()
        assert ids[: len(prompt)].tolist() == prompt
