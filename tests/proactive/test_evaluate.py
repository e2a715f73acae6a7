"""The evaluate command on each thing that it takes: the metrics equal those of the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import split_by_scene
from models.learning.published_metrics import PUBLISHED_REWARD_ROWS
from proactive import evaluate
from tests.datamodules.corpus.test_tables import write_csv
from tests.helpers import command, small_root
from tests.proactive.conftest import FinishedRun


def metrics(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def histories(rows: list[AnnotatedRow]) -> list[tuple]:
    return [tuple((event.time, event.event) for event in row.history) for row in rows]


@pytest.mark.parametrize("what", [".", "checkpoints/best.ckpt", "export"])
def test_evaluate_gives_the_metrics_of_the_run(
    what: str, finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    ended = call(evaluate.main, "reward", "--checkpoint", finished_run.folder / what, "--output", "new/metrics.json")
    assert (ended.code, ended.err) == (0, "")
    found, expected = metrics(tmp_path / "new" / "metrics.json"), metrics(finished_run.folder / "metrics.json")
    for reading in ("raw", "calibrated"):
        assert found["test"][reading] == pytest.approx(expected["test"][reading], abs=1e-6)
    for same in ("calibration", "contamination", "split", "published", "versions", "task"):
        assert found[same] == expected[same], same
    assert found["rows"]["test"] == expected["rows"]["test"]


def test_without_best_weights_the_last_ones_are_evaluated(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished_run.folder / "checkpoints", folder / "checkpoints")
    (folder / "checkpoints" / "best.ckpt").unlink()
    assert call(evaluate.main, "reward", "--checkpoint", folder, "--output", "m.json").code == 0
    assert metrics(tmp_path / "m.json")["weights"] == str(folder / "checkpoints" / "last.ckpt")


def test_another_root_and_split_are_measured_with_their_contamination(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    trained = split_by_scene(load_corpus(str(finished_run.root)), 3, 0).train
    trained_on = set(histories(trained))
    root = small_root(tmp_path / "other", scenes=12, rows_per_scene=6)
    with (root / "reward_data" / "test_data.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row.published()) + "\n" for row in trained[:3])
    corpus = load_corpus(str(root))
    expected = sum(history in trained_on for history in histories(corpus.test))
    assert 0 < expected < len(corpus.test)  # else this test would show nothing
    ended = call(
        evaluate.main,
        "reward",
        f"--checkpoint={finished_run.folder}",
        f"--data.root={root}",
        "--data.split=published",
        "--output=m.json",
    )
    assert (ended.code, ended.err) == (0, "")
    record = metrics(tmp_path / "m.json")
    assert record["split"] == f"{root}, published split"
    assert record["rows"]["test"] == record["test"]["raw"]["rows"] == len(corpus.test)
    assert record["contamination"]["contaminated_rows"] == expected
    assert {found["rows"] for found in record["baselines"].values()} == {len(corpus.test)}
    assert f"{expected} of {len(corpus.test)} test rows have a history that was trained on" in ended.out


@pytest.mark.parametrize("name", ["other.csv", "tables/test.csv", "files/reward_data/test_data.jsonl"])
def test_all_rows_of_another_root_are_tested_if_asked(
    name: str, finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    """Of one scene, too few for a split, and without training rows."""
    corpus = load_corpus(str(finished_run.root))
    rows = [row for row in corpus.rows if row.scene == corpus.test[0].scene]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        cells = [(row.published()["obs"], row.proposal, row.accepted) for row in rows]
        write_csv(path, [dict(zip(("history", "proposal", "accepted"), row, strict=True)) for row in cells])
    else:
        path.write_text("".join(json.dumps(row.published()) + "\n" for row in rows))
    root = {"other.csv": path, "tables/test.csv": path.parent}.get(name, tmp_path / "files")
    options = ("reward", f"--checkpoint={finished_run.folder}", f"--data.root={root}", "--output=m.json")
    refused = call(evaluate.main, *options)
    assert refused.code == 2
    assert not (tmp_path / "m.json").exists()

    ended = call(evaluate.main, *options, "--data.split=all")
    assert (ended.code, ended.err) == (0, "")
    record = metrics(tmp_path / "m.json")
    assert record["split"] == f"{root}, all rows"
    assert record["rows"]["test"] == record["test"]["raw"]["rows"] == len(rows)
    trained_on = set(histories(split_by_scene(corpus, 3, 0).train))
    assert record["contamination"]["contaminated_rows"] == sum(row in trained_on for row in histories(rows))
    assert {found["rows"] for found in record["baselines"].values()} == {len(rows)}


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("test.csv", "history,proposal,accepted\n", "holds no row"),
        ("reward_data/test_data.jsonl", "", "reward_data/test_data.jsonl: holds no row"),
        ("notes.txt", "", "has no reward_data/train_data.jsonl, and no table that trains"),
    ],
)
def test_a_root_without_rows_cannot_be_tested(
    name: str, text: str, error: str, finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    ended = call(evaluate.main, "reward", f"--checkpoint={finished_run.folder}", "--data.root=root", "--data.split=all")
    assert ended.code == 2
    assert error in ended.err


def test_the_divided_rows_of_another_root_are_told(finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    root = small_root(tmp_path / "other", scenes=12, rows_per_scene=6)
    checkpoint = f"--checkpoint={finished_run.folder}"
    told = f"data.split: the rows of {root} are divided as in training"
    assert told in call(evaluate.main, "reward", checkpoint, f"--data.root={root}").out
    assert told not in call(evaluate.main, "reward", checkpoint, f"--data.root={root}", "--data.split=by_scene").out
    assert "data.split" not in call(evaluate.main, "reward", checkpoint, f"--data.root={finished_run.root}").out


def test_baselines_are_fitted_on_the_runs_own_rows_or_left_out(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    """An export whose run's data is gone, tested on other rows."""
    folder = tmp_path / "export"
    shutil.copytree(finished_run.folder / "export", folder)
    content = json.loads((folder / "proactive.json").read_text())
    content["data"]["hyperparameters"]["root"] = str(tmp_path / "gone")
    (folder / "proactive.json").write_text(json.dumps(content))
    at = ("--data.root", finished_run.root, "--output=m.json")
    ended = call(evaluate.main, "reward", f"--checkpoint={folder}", *at)
    assert metrics(tmp_path / "m.json")["baselines"] == {}
    assert "no baselines: the training rows of the model are not available" in " ".join(ended.out.split())


def test_another_fold_tests_other_rows(finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    """Rows of another fold were trained on, and the report says so."""
    call(evaluate.main, "reward", f"--checkpoint={finished_run.folder}", "--data.fold=2", "--output=m.json")
    record = metrics(tmp_path / "m.json")
    assert record["split"].endswith("fold 2 of 3")
    rows = len(split_by_scene(load_corpus(str(finished_run.root)), 3, 2).test)
    assert record["contamination"] == {
        "test_rows": rows,
        "contaminated_rows": rows,
        "fraction": 1.0,
        "validated_rows": 0,
        "allowed": False,
    }


def test_the_validation_fold_is_marked_and_an_older_checkpoint_is_marked_unknown(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    ended = call(evaluate.main, "reward", f"--checkpoint={finished_run.folder}", "--data.fold=1", "--output=m.json")
    found = metrics(tmp_path / "m.json")["contamination"]
    assert found["contaminated_rows"] == 0
    assert found["validated_rows"] == found["test_rows"] > 0
    assert f"VALIDATED ON: {found['test_rows']} of {found['test_rows']} test rows" in " ".join(ended.out.split())

    old = tmp_path / "old"
    shutil.copytree(finished_run.folder / "export", old)
    content = json.loads((old / "proactive.json").read_text())
    content["data"] = {name: value for name, value in content["data"].items() if not name.startswith("validation_")}
    (old / "proactive.json").write_text(json.dumps(content))
    ended = call(evaluate.main, "reward", f"--checkpoint={old}", "--data.fold=1", "--output=old.json")
    assert metrics(tmp_path / "old.json")["contamination"]["validated_rows"] is None
    assert "VALIDATION UNKNOWN: the checkpoint does not say" in " ".join(ended.out.split())


def test_quiet_prints_nothing_and_still_writes(finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    ended = call(evaluate.main, "reward", f"--checkpoint={finished_run.folder}", "--quiet", "--output=m.json")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert metrics(tmp_path / "m.json")["test"]


def test_the_printed_table_on_embedded_data(finished_run: FinishedRun, tmp_path: Path) -> None:
    """As a process: the metrics, their intervals, the published rows and the contamination, as plain text."""
    ended = command(
        "proactive.evaluate",
        "reward",
        f"--checkpoint={finished_run.folder / 'export'}",
        "--data.root=embedded",
        "--data.split=published",
        "--data.token_budget=1500",
        "--output=m.json",
        cwd=tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    assert "\r" not in ended.stdout
    rows = {
        cells[0]: cells[1:]
        for line in ended.stdout.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 8
    }
    record = metrics(tmp_path / "m.json")
    assert rows["people"][6] == f"{record['test']['raw']['people_acceptance_rate']:.4f}"
    for reading in ("raw", "calibrated", "f1_optimal"):
        figures, shown = record["test"][reading], rows[f"this model, {record['readings'][reading]}"]
        for column, name in ((0, "accuracy"), (3, "f1")):
            low, high = figures[f"{name}_low"], figures[f"{name}_high"]
            assert low <= figures[name] <= high
            assert shown[column] == f"{figures[name]:.4f} [{low:.3f}, {high:.3f}]"
        assert shown[1:3] == [f"{figures[name]:.4f}" for name in ("precision", "recall")]
        assert shown[4:] == [f"{figures[name]:.4f}" for name in ("auroc", "calibration_error", "acceptance_rate")]
    assert not set(rows) & set(PUBLISHED_REWARD_ROWS), "other rows than the published ones"
    for name in ("accept everything", "bag of words"):
        assert rows[name][5] == f"{record['baselines'][name]['calibration_error']:.4f}"
    found = record["contamination"]
    assert f"{found['contaminated_rows']} of {found['test_rows']} test rows have a history" in ended.stdout
