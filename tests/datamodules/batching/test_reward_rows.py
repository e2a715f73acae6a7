"""RewardDataModule: sizes, batches, truncation, cache, and what a checkpoint keeps."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning import Trainer
from torch import Tensor

from datamodules.batching import row_tokenizer as row_tokenizer_module
from datamodules.batching import token_cache as cache_module
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from datamodules.corpus.records import AnnotatedRow, Category, Event
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import Split
from datamodules.errors import UserError
from datamodules.prompting import templates as prompts
from datamodules.prompting.segments import Data, Segment, SegmentTokenizer, truncate
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, render
from tests.datamodules.conftest import row_of
from tests.helpers import PROACTIVEBENCH, needs_proactivebench, write_jsonl

SPLITS = ("train", "validation", "test")
PROMPT = "instructions: Judge.\nevent: '{event} '\nproposal: 'Do {proposal}?'\nno_proposal: Nothing?\n"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of our own instead of the user's; shared, so that equal modules are tokenized once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


def trainer(**options: Any) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, **options},
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def made(root: Path, attach: Trainer | None = None, stage: str = "fit", **options: Any) -> RewardDataModule:
    """A data module of a small root, set up as a run does it."""
    small = {"folds": 3, "vocabulary_size": 400, "batch_size": 8, "micro_batch_size": 2}
    data = RewardDataModule(root=str(root), **{**small, **options})
    data.trainer = attach
    data.setup(stage)
    return data


def micro_batches(loader: Iterable[list[RewardBatch]]) -> Iterator[RewardBatch]:
    return (micro_batch for step in loader for micro_batch in step)


def loaders(data: RewardDataModule) -> dict[str, Iterator[RewardBatch]]:
    """The micro-batches of each split."""
    each = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    return dict(zip(SPLITS, map(micro_batches, each), strict=True))


def plain(batches: Any) -> Any:
    """Batches that == can compare."""
    if isinstance(batches, Tensor):
        return batches.tolist()
    if isinstance(batches, dict):
        return {name: plain(value) for name, value in batches.items()}
    if isinstance(batches, int):
        return batches
    return [plain(batch) for batch in batches]


def written_out(data: RewardDataModule, row: AnnotatedRow) -> str:
    """The prompt of a row, as text."""
    parts = [part for segment in render(data.template, row) for part in segment]
    return "".join(part.text if isinstance(part, Data) else part for part in parts)


def ids_of(data: RewardDataModule, name: str) -> list[list[int]]:
    """The token ids of each row of a split, in its order."""
    ids: dict[int, list[int]] = {}
    for batch in loaders(data)[name]:
        for row, tokens, mask in zip(batch["row"], *batch["inputs"].values(), strict=True):
            ids[int(row)] = tokens[mask.bool()].tolist()
    return [ids[row] for row in range(len(ids))]


# Batches


def test_batches_hold_every_row_once_as_its_prompt_says(root: Path) -> None:
    data = made(root)
    for name, loader in loaders(data).items():
        rows, seen = getattr(data.split, name), []
        for batch in loader:
            inputs = batch["inputs"]
            for place, number in enumerate(batch["row"].tolist()):
                ids = inputs["input_ids"][place][inputs["attention_mask"][place].bool()]
                assert data.tokenizer.decode(ids) == "<bos>" + written_out(data, rows[number])
                assert batch["label"][place] == rows[number].accepted
                assert list(Category)[batch["category"][place]] == rows[number].category
                seen.append(number)
            assert inputs["input_ids"][inputs["attention_mask"] == 0].eq(data.tokenizer.pad_token_id).all()
            assert len(batch["row"]) <= 2
        assert sorted(seen) == list(range(len(rows)))


def test_training_order_depends_on_the_order_seed(root: Path) -> None:
    def order(seed: int) -> list[list[int]]:
        data = made(root)
        data.order_seed = seed
        return [batch["row"].tolist() for batch in loaders(data)["train"]]

    assert order(1) == order(1) != order(2)


def test_workers_give_the_same_batches(root: Path) -> None:
    alone, helped = (loaders(made(root, num_workers=workers)) for workers in (0, 2))
    for name in ("train", "test"):
        assert plain(alone[name]) == plain(helped[name])


def test_balance_samples_each_category_about_equally(embedded: Any) -> None:
    data = made(Path("embedded"), balance="category", cache=False)
    drawn = Counter(int(category) for batch in loaders(data)["train"] for category in batch["category"])
    assert drawn.total() == len(data.split.train)
    assert [drawn[number] / drawn.total() for number in range(4)] == pytest.approx([0.25] * 4, abs=0.04)
    whole = Counter(row.category.number for row in data.split.train)
    plainly = loaders(made(Path("embedded"), cache=False))["train"]
    assert Counter(int(category) for batch in plainly for category in batch["category"]) == whole
    assert max(whole.values()) > 0.4 * whole.total(), "the rows themselves are far from balanced"


# Sizes


@pytest.mark.parametrize(("batch_size", "micro_batch_size", "accumulation"), [(8, 2, 4), (8, 8, 1), (7, 3, 3)])
def test_accumulation_follows_from_the_sizes(
    root: Path, batch_size: int, micro_batch_size: int, accumulation: int
) -> None:
    data = made(root, batch_size=batch_size, micro_batch_size=micro_batch_size, scenes_per_step=None)
    steps = list(data.train_dataloader())
    assert {len(step) for step in steps[:-1]} == {accumulation}
    assert {sum(len(batch["row"]) for batch in step) for step in steps[:-1]} == {batch_size}


def test_batch_size_is_the_total_over_all_devices(root: Path) -> None:
    alone, shared = (made(root, trainer(**more)) for more in ({}, {"devices": 2, "strategy": "ddp"}))
    assert len(alone.train_dataloader()) == len(shared.train_dataloader())
    first = next(iter(shared.train_dataloader()))
    assert sum(len(batch["row"]) for batch in first) == 4
    assert {float(batch["weight"][0]) for batch in first} == {2 / 8}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "data.batch_size: expected 1 or more, got 0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size: expected 1 or more, got 0"),
        ({"max_length": 300, "token_budget": 299}, "data.token_budget: 299 "),
        ({"batch_size": 8, "scenes_per_step": 3}, "data.scenes_per_step: 8 rows"),
        ({"batch_size": 8, "scenes_per_step": 0}, "data.scenes_per_step: expected 1 or more, got 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(root: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        made(root, **options).train_dataloader()
    assert expected in caught.value.what


# Prompt and length


def test_a_users_prompt_file_renders_the_rows(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(PROMPT)
    data = made(root, prompt=str(path))
    row = data.split.test[0]
    assert data.tokenizer.decode(ids_of(data, "test")[0]) == "<bos>" + written_out(data, row)
    assert written_out(data, row).startswith(f"Judge.{row.history[0].event} ")


def test_long_histories_lose_their_oldest_events_and_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = made(root)
    assert whole.truncated == dict.fromkeys(SPLITS, 0)
    segmenter = SegmentTokenizer(whole.tokenizer)
    limit = 120
    with caplog.at_level(logging.INFO, "proactive"):
        data = made(root, max_length=limit)
    for name in SPLITS:
        rows, full = getattr(data.split, name), ids_of(whole, name)
        long = 0
        for row, ids, all_ids in zip(rows, ids_of(data, name), full, strict=True):
            first, *_, last = segmenter.encode(render(data.template, row))
            head = [*segmenter.prefix, *first]
            assert len(ids) <= limit
            assert ids[: len(head)] == head
            assert ids == head + all_ids[len(all_ids) - len(ids) + len(head) :], "the newest events stay"
            assert ids[-len(last) :] == last
            long += len(all_ids) - len(last) + data.branch_length > limit
            assert (len(ids) == len(all_ids)) is (len(all_ids) - len(last) + data.branch_length <= limit)
        assert data.truncated[name] == long > 0
        said = f"{long} of {len(rows)} {name} rows lost their oldest events to data.max_length {limit}, of which "
        assert f"{said}{data.branch_length} are reserved for the proposal" in caplog.text


def histories(data: RewardDataModule) -> Iterator[tuple[AnnotatedRow, list[int]]]:
    """Each row, and the token ids before its proposal."""
    for name, encoded in data.encoded.items():
        for row, ids in zip(getattr(data.split, name), encoded.input_ids, strict=True):
            yield row, list(ids[: len(ids) - len(data.segmenter.encode(data.branch(row))[0])])


@pytest.mark.parametrize("room", [0, 20, 80])
def test_the_number_of_events_read_does_not_depend_on_the_proposal(root: Path, tmp_path: Path, room: int) -> None:
    """Rows of one history are one trunk, also of proposals that are a word and proposals that are twenty."""
    for number, row in enumerate(rows := made(root).split.train + made(root).split.test):
        rows[number] = row.model_copy(update={"proposal": row.proposal and row.proposal * (1 + number % 2)})
    rows += [row.model_copy(update={"proposal": "Go"}) for row in rows]
    write_jsonl(tmp_path / "reward_data" / "train_data.jsonl", rows)
    whole = made(tmp_path)
    limit = len(whole.segmenter.prefix) + whole.branch_length + room
    limit += len(whole.segmenter.encode(prompts.render_history(whole.template, ()))[0])
    data = made(tmp_path, max_length=limit)
    trunks: dict[int, set[tuple[int, ...]]] = {}
    for row, trunk in histories(data):
        trunks.setdefault(row.history_digest, set()).add(tuple(trunk))
    assert all(len(seen) == 1 for seen in trunks.values())
    assert sum(data.truncated.values()) > 0
    assert max(len(ids) for name in SPLITS for ids in ids_of(data, name)) <= limit


def test_later_proposals_are_read_after_the_same_events(root: Path, tmp_path: Path) -> None:
    """As a judge reads them: one at a time, with the room of the training; only what is longer takes more."""
    data = made(root, max_length=150)
    row = max(data.split.train, key=lambda row: len(row.history))

    def length(proposal: str) -> int:
        return len(data.segmenter.encode(data.branch(row.model_copy(update={"proposal": proposal})))[0])

    expected = next(found for seen, found in histories(data) if seen.history == row.history)
    longest = "Go"
    while len(expected) + length(longest) <= 150:
        longest += " on"
    proposals = ["Go", None, "Go on and on", longest]

    def trunk(proposal: str | None) -> list[int]:
        again = RewardDataModule.from_state(stored(data, tmp_path), cache=False)
        again._split = Split([], [], [row.model_copy(update={"proposal": proposal})])
        again.setup("test")
        ((_, found),) = histories(again)
        return found

    short, null, middling, long = map(trunk, proposals)
    assert short == null == middling == expected
    assert len(long) < len(expected)


def test_only_the_events_that_can_fit_are_rendered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is read is the same as of all of it."""
    data = made(root, max_length=200, cache=False)
    data.setup("test")
    row = row_of([f"event {number} {'x ' * (number % 5)}" for number in range(5000)])
    first, *events, branch = data.segmenter.encode(render(data.template, row))
    expected, _ = truncate([first, *events, branch], 200 - len(data.segmenter.prefix), data.branch_length)
    rendered: list[int] = []
    whole = row_tokenizer_module.render_history

    def watched(template: RewardTemplate, history: tuple[Event, ...]) -> list[Segment]:
        rendered.append(len(history))
        return whole(template, history)

    monkeypatch.setattr(row_tokenizer_module, "render_history", watched)
    (found,) = data.tokenize("test", [row]).rows["input_ids"]
    assert list(found) == [*data.segmenter.prefix, *expected]
    assert data.truncated["test"] == 1
    assert sum(rendered) < 200


def test_prompt_longer_than_max_length_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: instructions and proposal of row \d+ of the train split"):
        made(root, max_length=20)


def test_max_length_includes_prefix_and_suffix(root: Path, tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    tokenizers["encoder"].save_pretrained(tmp_path)
    data = made(root, tokenizer=str(tmp_path), max_length=400)
    rows = [ids for name in SPLITS for ids in ids_of(data, name)]
    assert sum(data.truncated.values()) > 0
    assert 390 < max(map(len, rows)) <= 400
    for ids in rows:
        assert ids[0] == data.tokenizer.cls_token_id
        assert [place for place, token in enumerate(ids) if token == data.tokenizer.sep_token_id] == [len(ids) - 1]


# Cache


def test_second_tokenization_comes_from_the_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    first = made(root, max_length=130)
    files = sorted(tmp_path.rglob("*.arrow"))
    assert len(files) == 3

    def tokenizes_again(*args: Any) -> None:
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(row_tokenizer_module.RowTokenizer, "encode_all", tokenizes_again)
        second = made(root, max_length=130)
    assert (second.truncated, ids_of(second, "train")) == (first.truncated, ids_of(first, "train"))
    assert sorted(tmp_path.rglob("*.arrow")) == files
    for options in ({"max_length": 131}, {"vocabulary_size": 380}, {"fold": 1}):
        made(root, **{"max_length": 130, **options})
        assert len(list(tmp_path.rglob("*.arrow"))) > len(files), f"{options} needs tokens of its own"
        files = sorted(tmp_path.rglob("*.arrow"))


def test_rows_cached_by_other_code_are_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where an event is rendered in another way nor where the code's text is another."""
    first = made(root)
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "on_one_line", str.upper)
        assert ids_of(made(root), "test") != ids_of(first, "test")
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    files = len(list(folder.rglob("*.arrow")))
    monkeypatch.setattr(cache_module, "code_digest", lambda: "other code")
    assert ids_of(made(root), "test") == ids_of(first, "test")
    assert len(list(folder.rglob("*.arrow"))) == files + 3


def test_cache_can_be_switched_off(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert ids_of(made(root, cache=False), "test")
    assert list(tmp_path.iterdir()) == []


# Stages, splits and figures


@pytest.mark.parametrize(("stage", "names"), [("fit", SPLITS), ("validate", ("validation",)), ("test", ("test",))])
def test_each_stage_prepares_its_loaders(root: Path, stage: str, names: tuple[str, ...]) -> None:
    data = made(root, stage=stage)
    give = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    for name in names:
        assert sum(len(batch["row"]) for batch in micro_batches(give[name]())) == len(getattr(data.split, name))


@pytest.mark.parametrize("split", ["published", "by_scene"])
def test_a_run_logs_its_split_and_contamination_first(root: Path, caplog: pytest.LogCaptureFixture, split: str) -> None:
    with caplog.at_level(logging.INFO, "proactive"):
        data = made(root, split=split, validation_fraction=0.25)
    assert f"data: {data.description}: " in caplog.text
    assert f"{len(data.split.train)} train, {len(data.split.validation)} validation" in caplog.text
    assert f"contamination: {data.contamination}" in caplog.text
    assert split in data.description
    known = {row.history for row in data.split.train}
    assert data.contamination.contaminated_rows == sum(row.history in known for row in data.split.test)


def test_properties_before_setup_raise(root: Path) -> None:
    data = RewardDataModule(root=str(root))
    for name in ("split", "tokenizer"):
        with pytest.raises(RuntimeError, match="setup"):
            getattr(data, name)


@needs_proactivebench
def test_published_rows_can_be_tokenized(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "proactive"):
        data = made(PROACTIVEBENCH, split="published")
    assert (len(data.split.train) + len(data.split.validation), len(data.split.test)) == (1629, 120)
    assert "120 of 120 test rows (100%)" in caplog.text
    rows = [ids for name in SPLITS for ids in ids_of(data, name)]
    assert len(rows) == 1749
    assert max(map(len, rows)) <= data.max_length


# Checkpoints


def stored(data: RewardDataModule, folder: Path) -> dict[str, Any]:
    """The state after a checkpoint that may hold plain types only."""
    torch.save(data.state_dict(), folder / "state")
    return torch.load(folder / "state", weights_only=True)


def test_a_resumed_run_accepts_its_own_state(root: Path, tmp_path: Path) -> None:
    state = stored(made(root), tmp_path)
    again = made(root)
    again.load_state_dict(state)
    assert again.state_dict() == state


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 16}, "--data.batch_size 8"),
        ({"max_length": 500}, "--data.max_length 1024"),
        ({"scenes_per_step": None}, "--data.scenes_per_step 4"),
        ({"balance": "category"}, "--data.balance none"),
        ({"fold": 1}, "--data.fold 0"),
        ({"seed": 1}, "--data.seed 0"),
        ({"folds": 4}, "--data.folds 3"),
        ({"split": "published"}, "--data.split by_scene"),
        ({"validation_fraction": 0.3}, "--data.validation_fraction 0.1"),
        ({"num_workers": 1}, "--data.num_workers 0"),
        ({"root": "fewer rows"}, "data.root"),
        ({"prompt": "own"}, "data.prompt"),
        ({"vocabulary_size": 380}, "data.vocabulary_size"),
    ],
    ids=str,
)
def test_resumed_run_refuses_other_data(root: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    data = made(root)
    state = stored(data, tmp_path)
    place = root
    if options.pop("root", None):
        write_jsonl(tmp_path / "reward_data" / "train_data.jsonl", [*data.split.train, *data.split.test])
        place = tmp_path
    if options.pop("prompt", None):
        (tmp_path / "own.yaml").write_text(PROMPT)
        options = {"prompt": str(tmp_path / "own.yaml")}
    with pytest.raises(UserError) as caught:
        made(place, **options).load_state_dict(state)
    assert "checkpoint" in caught.value.what
    assert named in caught.value.hint


@pytest.mark.parametrize(
    "options", [{"layout": "rows"}, {"token_budget": 4096}, {"micro_batch_size": 4}, {"cache": False}], ids=str
)
def test_a_resumed_run_may_change_how_steps_are_computed(root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    state = stored(made(root), tmp_path)
    made(root, **options).load_state_dict(state)


def test_resumed_run_needs_the_same_order_and_labels(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made(root)
    state = stored(data, tmp_path)
    other_order = made(root)
    other_order.order_seed = 1
    with pytest.raises(UserError, match="seed_everything: 1, but the checkpoint's run has 0"):
        other_order.load_state_dict(state)
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "on_one_line", str.upper)
        with pytest.raises(UserError, match="differ"):
            made(root).load_state_dict(state)
    rows = load_corpus(str(root)).rows
    other = rows[0].model_copy(update={"accepted": not rows[0].accepted, "help_needed": None})
    write_jsonl(tmp_path / "reward_data" / "train_data.jsonl", [other, *rows[1:]])
    with pytest.raises(UserError, match="the training rows differ"):
        made(tmp_path).load_state_dict(state)


def test_a_module_is_rebuilt_from_its_state(root: Path, tmp_path: Path) -> None:
    """Also where the prompt file is gone."""
    path = tmp_path / "own.yaml"
    path.write_text(PROMPT)
    original = made(root, prompt=str(path), max_length=90)
    state = stored(original, tmp_path)
    path.unlink()
    again = RewardDataModule.from_state(state)
    again.setup("test")
    assert again.template == original.template
    assert plain(again.test_dataloader()) == plain(original.test_dataloader())
    assert {**again.hparams, "prompt": None} == {**original.hparams, "prompt": None}
    assert again.contamination == original.contamination


def test_state_measures_other_rows_with_the_first_tokenizer_and_histories(root: Path, tmp_path: Path) -> None:
    original = made(root)
    seen, unseen = original.split.train[:4], original.split.test[:3]
    write_jsonl(tmp_path / "reward_data" / "train_data.jsonl", original.split.train[:50])
    write_jsonl(tmp_path / "reward_data" / "test_data.jsonl", [*seen, *unseen])
    given = {"root": str(tmp_path), "split": "published", "max_length": None}
    again = RewardDataModule.from_state(stored(original, tmp_path), **given)
    again.setup("test")
    assert again.max_length == original.max_length
    assert (again.contamination.test_rows, again.contamination.contaminated_rows) == (7, 4)
    assert again.tokenizer("The user").input_ids == original.tokenizer("The user").input_ids
    overridden = RewardDataModule.from_state(stored(original, tmp_path), prompt=str(DEFAULT_PROMPT))
    assert overridden.template == RewardTemplate.read(DEFAULT_PROMPT)


@pytest.mark.parametrize("balance", ["none", "category"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 3])
def test_loader_resumes_within_an_epoch(root: Path, tmp_path: Path, workers: int, balance: str, seen: int) -> None:
    """In the second epoch, from a checkpoint that holds plain types only."""

    def loader() -> Any:
        fresh = made(root, num_workers=workers, balance=balance).train_dataloader()
        fresh.sampler.set_epoch(1)
        return fresh

    whole = plain(loader())
    interrupted = loader()
    batches = iter(interrupted)
    first = [next(batches) for _ in range(seen)]
    torch.save(interrupted.state_dict(), tmp_path / "position")
    resumed = loader()
    resumed.load_state_dict(torch.load(tmp_path / "position", weights_only=True))
    assert plain(first) == whole[:seen]
    assert plain(resumed) == whole[seen:]
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == len(whole), "the next epoch is whole again"


@pytest.mark.parametrize(
    "state",
    [
        {"_sampler_iter_yielded": 2, "_num_yielded": 2, "_iterator_finished": False},
        {"_snapshot": {"_snapshot_step": 2, "_main_snapshot": {"_num_workers": 2}}, "_steps_since_snapshot": 0},
    ],
    ids=["without workers", "with workers"],
)
def test_loader_resumes_from_the_torchdata_state_of_earlier_versions(root: Path, state: dict[str, Any]) -> None:
    loader = made(root).train_dataloader()
    expected = plain(loader)[2:]
    loader.load_state_dict(state)
    assert plain(loader) == expected
