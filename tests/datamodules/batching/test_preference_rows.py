"""PreferenceDataModule: groups of two rows, their splits, and what is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.batching.answer_rows import AnswerKind
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.corpus.answers import Answer, write_answer
from datamodules.corpus.records import scene_of
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import validates
from datamodules.errors import UserError
from tests.helpers import small_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), scenes=12, rows_per_scene=20)


def small_data(root: Path, **options: Any) -> PreferenceDataModule:
    defaults = {"root": str(root), "folds": 3, "vocabulary_size": 400, "batch_size": 8, "cache": False}
    data = PreferenceDataModule(**{**defaults, **options})
    data.setup("fit")
    return data


def text_of(data: PreferenceDataModule, ids: Any) -> str:
    return data.tokenizer.decode(ids)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_batch_of_pairs_has_both_answers_after_the_same_history(root: Path, layout: str) -> None:
    data = small_data(root, layout=layout, token_budget=1500, micro_batch_size=4)
    data.choose_layout(None)
    seen = []
    examples = data.groups("train").examples
    for step in data.train_dataloader():
        for batch in step:
            row = batch["row"][batch["groups"]]
            for chosen, rejected in row.tolist():
                assert examples[chosen].history == examples[rejected].history
                assert examples[chosen].kind != AnswerKind.REJECTED
                assert examples[rejected].kind == AnswerKind.REJECTED
                seen.append((chosen, rejected))
            assert batch["kind"].tolist() == [int(examples[row].kind) for row in batch["row"].tolist()]
        assert sum(float(batch["group_weight"].sum()) for batch in step) == pytest.approx(1)
    assert sorted(seen) == sorted(map(tuple, data.groups("train").rows.tolist()))
    assert seen


def test_a_tree_has_an_answer_of_several_pairs_once(root: Path) -> None:
    data = small_data(root, layout="tree", token_budget=2000)
    data.choose_layout(None)
    for step in data.train_dataloader():
        for batch in step:
            assert len(batch["row"]) == len(batch["row"].unique()) == len(batch["groups"].unique())


def test_the_answers_of_rows_are_tokenized_as_an_agents(root: Path) -> None:
    data = small_data(root)
    encoded = data.encoded["train"]
    for index, example in enumerate(data.groups("train").examples[:20]):
        text = text_of(data, np.asarray(encoded.input_ids[index])[encoded.answers[index]])  # type: ignore[index]
        assert text.startswith(write_answer(Answer(proposal=example.proposal)))


def test_kto_measures_divergence_on_proposals_of_other_rows(root: Path) -> None:
    data = small_data(root, objective="kto")
    rows = data.split.train
    groups = data.groups("train")
    assert len(groups.rows) == len({(row.history_digest, row.proposal, row.accepted) for row in rows})
    proposals = {row.proposal for row in rows}
    for judged, other in groups.rows.tolist():
        first, second = groups.examples[judged], groups.examples[other]
        assert first.history == second.history
        assert second.kind == AnswerKind.MISMATCHED
        assert second.proposal in proposals
    mismatched = [groups.examples[judged].proposal != groups.examples[other].proposal for judged, other in groups.rows]
    assert np.mean(mismatched) > 0.5


def test_pairs_of_kto_rows_are_those_of_dpo(root: Path) -> None:
    def texts(data: PreferenceDataModule) -> set[Any]:
        examples = data.groups("test").examples
        return {(examples[a].history, examples[a].proposal, examples[b].proposal) for a, b in data.pairs("test")}

    assert texts(small_data(root, objective="kto")) == texts(small_data(root)) != set()


def line(row: Any, **fields: Any) -> dict[str, Any]:
    return {"history": [event.model_dump() for event in row.history], **fields}


def test_lines_of_held_out_scenes_are_left_out(root: Path, tmp_path: Path) -> None:
    plain = small_data(root)
    path = tmp_path / "preferences.jsonl"
    new = {"history": [{"time": "1", "event": "An event that no session has."}], "chosen": "New A", "rejected": "B"}
    lines = [line(plain.split.train[0], proposal="Known", accepted=False)]
    lines += [line(row, chosen="Leak", rejected=None) for row in (plain.split.test[0], plain.split.validation[0])]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*lines, new]))
    data = small_data(root, preferences=[str(path)], validation_fraction=0.0)
    proposals = {example.proposal for example in data.groups("train").examples}
    assert "New A" in proposals
    assert "Leak" not in proposals | {example.proposal for example in data.groups("validation").examples}
    assert data.left_out == 2
    assert data.seen["training_histories"] != plain.seen["training_histories"]
    allowed = small_data(root, preferences=[str(path)], validation_fraction=0.0, allow_contamination=True)
    assert "Leak" in {example.proposal for example in allowed.groups("train").examples}


def test_files_alone_train_and_validate(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    events = [f"An event of a new session, number {number}." for number in range(40)]
    lines = [{"history": [{"time": "1", "event": e}], "chosen": "A", "rejected": None} for e in events]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    data = small_data(root, annotated=False, preferences=[str(path)], validation_fraction=0.4)
    histories = {stage: {e.history for e in data.groups(stage).examples} for stage in ("train", "validation")}
    assert len(histories["train"]) + len(histories["validation"]) == 40
    assert all(validates(scene_of(history), 0.4) for history in histories["validation"])
    assert {scene_of(history) for history in histories["validation"]} < set(data.seen["validation_scenes"])
    assert len(data.groups("test").rows)  # of the root's annotated rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotated": False}, "data.annotated: false leaves no training data"),
        ({"annotated": False, "preferences": ["missing.jsonl"]}, "missing.jsonl"),
    ],
)
def test_missing_data_is_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_data(root, **options)


def test_a_root_without_rejected_proposals_has_no_pairs(root: Path, tmp_path: Path) -> None:
    rows = [row for row in load_corpus(str(root)).rows if row.accepted]
    folder = tmp_path / "accepted"
    (folder / "reward_data").mkdir(parents=True)
    text = "".join(json.dumps(row.published()) + "\n" for row in rows)
    (folder / "reward_data" / "train_data.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no pair of an accepted and a rejected proposal in the train split"):
        small_data(folder)


def test_other_pairs_have_another_digest(root: Path, tmp_path: Path) -> None:
    data = small_data(root)
    other = small_data(root)
    other.encoded["train"].group_weight.mul_(2)  # type: ignore[union-attr]
    assert data.split_digest("train") != other.split_digest("train")
    assert data.split_digest("train") == small_data(root).split_digest("train")
    assert torch.equal(data.encoded["train"].group_weight, torch.ones(len(data.groups("train").rows)))  # type: ignore[arg-type]
