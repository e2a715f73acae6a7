"""The inspect command: the figures of docs/design.md on the published files, and a recount on embedded data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.simulator import simulate
from proactive import inspect
from tests.helpers import PROACTIVEBENCH, needs_proactivebench, small_root


@needs_proactivebench
def test_counts_of_the_published_data_as_json(call: Callable) -> None:
    ended = call(inspect.main, "--root", PROACTIVEBENCH, "--json")
    assert (ended.code, ended.err) == (0, "")
    figures = json.loads(ended.out)
    train, test = figures["rows"]["train"], figures["rows"]["test"]
    assert (train["rows"], test["rows"]) == (1629, 120)
    assert train["categories"] == {
        "missed_need": 93,
        "non_response": 149,
        "correct_detection": 474,
        "false_alarm": 913,
    }
    assert set(test["categories"].values()) == {30}
    assert (round(train["human_agreement"], 3), round(test["human_agreement"], 3)) == (0.770, 0.917)
    for found, known in ((train, (0.145, 0.169, -0.214)), (test, (0.658, 1.0, 0.254))):
        alphas = found["krippendorff_alpha"]
        assert [alphas[kind]["alpha"] for kind in ("all", "offers", "silence")] == pytest.approx(known, abs=5e-4)
        assert alphas["all"]["alpha_low"] < known[0] < alphas["all"]["alpha_high"]
    assert (figures["all"]["scenes"], figures["all"]["distinct_histories"]) == (16, 313)
    assert round(figures["all"]["rows_per_history"], 1) == 5.6
    splits = figures["contamination"]
    assert splits["published"] == {"test_rows": 120, "contaminated_rows": 120, "fraction": 1.0}
    by_scene = [found for name, found in splits.items() if name.startswith("by_scene")]
    assert len(by_scene) == 5
    assert sum(found["test_rows"] for found in by_scene) == 1629 + 120
    assert {found["contaminated_rows"] for found in by_scene} == {0}
    traces = figures["traces"]
    assert (traces["traces"], traces["events"], traces["events_in_training_rows"]) == (12, 233, 233)
    assert (traces["scenes_outside_traces"], traces["scenes"]) == (4, 16)


@needs_proactivebench
def test_counts_of_the_published_data_as_tables(call: Callable) -> None:
    ended = call(inspect.main, "--root", PROACTIVEBENCH)
    assert (ended.code, ended.err) == (0, "")
    cells = {
        tuple(cell.strip() for cell in line.strip("│").split("│")) for line in ended.out.splitlines() if "│" in line
    }
    assert {
        ("rows", "1629", "120"),
        ("missed need", "93", "30"),
        ("non response", "149", "30"),
        ("correct detection", "474", "30"),
        ("false alarm", "913", "30"),
        ("human agreement", "0.770", "0.917"),
        ("annotators' alpha", "0.145 [0.068, 0.233]", "0.658 [0.516, 0.784]"),
        ("silence", "-0.214 [-0.289, -0.134]", "0.254 [0.143, 0.358]"),
        ("published", "120", "120", "100%"),
    } <= cells
    words = " ".join(ended.out.split())
    assert "1749 rows, 16 scenes, 313 distinct histories, 5.6 rows per history" in words
    assert "12 agent test traces: 233 of 233 events occur in the training rows" in words
    assert "4 of 16 scenes lie outside" in words


def test_counts_of_the_embedded_data_equal_a_recount(call: Callable) -> None:
    ended = call(inspect.main, "--json")
    assert (ended.code, ended.err) == (0, "")
    figures = json.loads(ended.out)
    train, test, traces = simulate(0)

    def histories(rows: list[AnnotatedRow]) -> set[tuple]:
        return {tuple((event.time, event.event) for event in row.history) for row in rows}

    assert figures["root"] == "embedded"
    assert (figures["rows"]["train"]["rows"], figures["rows"]["test"]["rows"]) == (len(train), len(test))
    assert figures["rows"]["train"]["categories"]["false_alarm"] == sum(
        row.proposal is not None and not row.accepted for row in train
    )
    assert figures["all"]["distinct_histories"] == len(histories(train + test))
    assert figures["all"]["scenes"] >= 48
    answers = [answer == row.accepted for row in test for answer in row.annotation]
    assert figures["rows"]["test"]["human_agreement"] == pytest.approx(sum(answers) / len(answers))
    assert figures["contamination"]["published"]["contaminated_rows"] == len(histories(train) & histories(test)) == 0
    a_row, tokens = figures["rows"]["train"]["tokens_per_row"], figures["rows"]["train"]["tokens"]
    assert a_row["mean"] * len(train) == pytest.approx(tokens["as_rows"])
    assert a_row["mean"] < a_row["greatest"] < tokens["as_tree"] < tokens["as_rows"]
    assert figures["traces"]["events"] == sum(map(len, traces.values()))


def test_seed_and_folds_change_the_counts(call: Callable) -> None:
    figures = json.loads(call(inspect.main, "--json", "--seed", "5", "--folds", "3").out)
    assert figures["all"]["rows"] == sum(map(len, simulate(5)[:2]))
    folds = [name for name in figures["contamination"] if name.startswith("by_scene")]
    assert folds == [f"by_scene, fold {fold} of 3" for fold in range(3)]


def test_contaminated_rows_of_the_published_split_are_counted(call: Callable, tmp_path: Path) -> None:
    root = small_root(tmp_path / "root")
    train_file, test_file = (root / "reward_data" / f"{name}_data.jsonl" for name in ("train", "test"))
    seen = train_file.read_text(encoding="utf-8").splitlines()[0]
    copies = "".join(f"{seen}\n" for _ in range(3))
    test_file.write_text(test_file.read_text(encoding="utf-8") + copies, encoding="utf-8")
    figures = json.loads(call(inspect.main, "--root", root, "--folds", "3", "--json").out)
    assert figures["contamination"]["published"] == {
        "test_rows": 23,
        "contaminated_rows": 3,
        "fraction": pytest.approx(3 / 23),
    }


def test_quiet_prints_nothing_and_json_is_still_json(call: Callable, tmp_path: Path) -> None:
    root = small_root(tmp_path / "root")
    quiet = call(inspect.main, "--root", root, "--folds", "3", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert json.loads(call(inspect.main, "--root", root, "--folds", "3", "--quiet", "--json").out)["root"] == str(root)
