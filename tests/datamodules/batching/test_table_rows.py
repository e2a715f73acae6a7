"""Data modules on tables: named scenes decide splits and steps, and a checkpoint's root is not downloaded unasked."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.batching.answer_rows import AgentDataModule, AnswerKind
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus import tables
from datamodules.corpus.columns import Columns
from datamodules.corpus.records import Event, scene_of
from datamodules.corpus.sources import load_corpus

SCENES = 9
START = "The user unlocks the screen."  # of all sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    """A table of sessions that begin with the same event, so that only their names tell them apart."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "history": [START, f"The user works on task {scene} of the afternoon.", f"Step {step}."],
            "proposal": proposal,
            "accepted": (scene + step + (proposal is None)) % 2,
            "session": scene,
        }
        for scene in range(SCENES)
        for step in range(4)
        for proposal in (f"Do step {step}.", None)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(kind: type, path: Path, **options: Any) -> Any:
    columns = Columns(scene="session")
    data = kind(root=str(path), columns=columns, folds=3, vocabulary_size=300, cache=False, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("kind", [RewardDataModule, AgentDataModule, PreferenceDataModule])
def test_named_scenes_are_held_out_whole(kind: type, sessions: Path) -> None:
    data = made(kind, sessions)
    parts = [{row.stated_scene for row in rows} for rows in (data.split.train, data.split.validation, data.split.test)]
    assert sorted(map(len, parts)) == [3, 3, 3]
    assert len(set.union(*parts)) == SCENES
    assert len(set(data.encoded["train"].scenes)) == 3  # steps and intervals take scenes from here
    assert set(data.encoded["train"].scenes) == {row.scene for row in data.split.train}


def test_the_seen_scenes_include_those_by_which_traces_are_recognized(sessions: Path) -> None:
    data = made(RewardDataModule, sessions)
    names = {row.scene for row in data.split.train}
    assert set(data.seen["training_scenes"]) == names | {scene_of([Event(time="0", event=START)])}


def test_conversations_about_held_out_named_scenes_are_left_out(sessions: Path, tmp_path: Path) -> None:
    told = tmp_path / "told.jsonl"
    talks = [f"The user works on task {scene} of the afternoon." for scene in range(SCENES)]
    records = [
        {"conversations": [{"role": "user", "content": talk}, {"role": "assistant", "content": "Fine."}]}
        for talk in talks
    ]
    told.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = made(AgentDataModule, sessions, conversations=[str(told)], validation_fraction=0.0)
    learned = int((data.encoded["train"].columns["kind"] == AnswerKind.CONVERSATION).sum())
    assert learned == 3
    assert data.conversation_counts["with events of test scenes"] == 6


def test_a_run_resumes_on_the_same_rows_in_another_format(sessions: Path, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = load_corpus(str(root)).rows
    cells = [
        {"e": [event.model_dump() for event in row.history], "proposal": row.proposal, "accepted": row.accepted}
        for row in rows
    ]
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    options: dict[str, Any] = {"folds": 3, "vocabulary_size": 300, "cache": False}
    table = RewardDataModule(root=str(path), columns=Columns(history="e"), **options)
    published = RewardDataModule(root=str(root), **options)
    for data in (table, published):
        data.setup("fit")
    published.load_state_dict(table.state_dict())
    restored = RewardDataModule.from_state(table.state_dict())
    assert (restored.root, restored.columns) == (str(path), Columns(history="e"))
    elsewhere = RewardDataModule.from_state(table.state_dict(), root=str(root))
    assert (elsewhere.root, elsewhere.columns) == (str(root), None)


def test_baselines_do_not_download_the_root_of_a_checkpoint(
    root: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def hub_tables(name: str, option: str) -> Any:
        asked.append(name)
        return tables.open_tables(str(sessions), option)

    monkeypatch.setattr(tables, "_hub_tables", hub_tables)
    state = made(RewardDataModule, Path("org/name")).state_dict()
    assert asked == ["org/name"]
    same = RewardDataModule.from_state(state)
    same.setup("test")
    assert same.word_scores is not None
    asked.clear()
    other = RewardDataModule.from_state(state, root=str(root))
    other.setup("test")
    assert other.word_scores is None
    assert asked == []
