"""`python -m proactive.compare`: what it pools, pairs, refuses and shows."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.corpus.json_records import read_jsonl
from models.reporting.decided_rows import DecidedRow
from proactive import compare, evaluate
from proactive.comparing.runs import settings
from tests.models.reporting.test_run_page import HOSTILE, Page
from tests.proactive.annotation.conftest import browser, faults, page_of  # noqa: F401 - fixtures
from tests.proactive.conftest import Ended, FinishedRun

Decide = Callable[[DecidedRow], float]


def as_it_was(row: DecidedRow) -> float:
    return row.probability


def right(row: DecidedRow) -> float:
    return float(row.target)


def variant(run: FinishedRun, folder: Path, decide: Decide = as_it_was, **options: Any) -> Path:
    """A copy of a finished run as another one: with other options, and other decisions on the rows of its fold."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "export"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in options.items():
        group, _, inner = name.partition("__")
        (config[group] if inner else config)[inner or group] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    fold = config["data"]["fold"]
    lines = []
    for row in read_jsonl(folder / "decisions.jsonl", DecidedRow):
        name = f"{fold:x}{config['data']['seed']:x}{row.row[2:]}" if fold or config["data"]["seed"] else row.row
        scene = f"{fold:x}{row.scene[1:]}" if fold else row.scene
        changes = {"row": name, "scene": scene, "probability": decide(row), "calibrated": decide(row)}
        lines.append(json.dumps(row.model_dump() | changes) + "\n")
    (folder / "decisions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def compared(call: Callable[..., Ended]) -> Callable[..., dict[str, Any]]:
    def look(*arguments: str | Path) -> dict[str, Any]:
        ended = call(compare.main, *arguments, "--output=out")
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.splitlines()[-1] == "out"
        return json.loads(Path("out", "compare.json").read_text())

    return look


def test_a_run_has_the_metrics_of_its_own_report(finished_run: FinishedRun, compared: Callable[..., Any]) -> None:
    record = json.loads((finished_run.folder / "metrics.json").read_text())
    found = compared(finished_run.folder)["kinds"]["reward"]
    metrics = found["settings"]["A"]["metrics"]
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        assert metrics[name]["value"] == pytest.approx(record["test"]["raw"][name], abs=1e-6)
    assert metrics["accuracy"]["low"] == pytest.approx(record["test"]["raw"]["accuracy_low"])
    words = next(one for one in found["baselines"] if one["name"] == "bag of words")
    assert words["metrics"]["auroc"]["value"] == pytest.approx(record["baselines"]["bag of words"]["auroc"], abs=1e-6)


def test_folds_and_seeds_are_pooled_and_settings_are_paired(
    finished_run: FinishedRun, compared: Callable[..., Any], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for fold in (0, 1):
        variant(finished_run, runs / "a" / str(fold), data__fold=fold)
        variant(finished_run, runs / "b" / str(fold), right, data__fold=fold, model__learning_rate=0.5)
        variant(finished_run, runs / "b" / str(fold + 2), data__fold=fold, model__learning_rate=0.5, seed_everything=7)
    found = compared(runs)["kinds"]["reward"]
    one, other = found["settings"]["A"], found["settings"]["B"]
    rows = len(read_jsonl(finished_run.folder / "decisions.jsonl", DecidedRow))
    assert (one["rows"], one["folds"], one["seeds"]) == (2 * rows, [0, 1], [0])
    assert (other["rows"], other["folds"], other["seeds"]) == (2 * rows, [0, 1], [0, 7])
    assert found["options"] == {"model.learning_rate": [0.001, 0.5]}
    accuracy = one["metrics"]["accuracy"]["value"]
    assert other["per_seed"]["0"]["accuracy"] == 1.0
    assert other["metrics"]["accuracy"]["value"] == pytest.approx((1 + accuracy) / 2)
    difference = found["differences"][0]
    assert (difference["of"], difference["minus"], difference["rows"], difference["seeds"]) == (
        "B",
        "A",
        2 * rows,
        [2, 1],
    )
    assert difference["metrics"]["accuracy"]["value"] == pytest.approx((1 - accuracy) / 2)
    assert difference["metrics"]["accuracy"]["low"] > 0
    assert any(note.startswith("ONE SEED") and " A " in note for note in found["notes"])
    lines = list(csv.DictReader(Path("out", "differences.csv").read_text().splitlines()))
    written = next(line for line in lines if (line["of"], line["minus"], line["metric"]) == ("B", "A", "accuracy"))
    assert float(written["difference"]) == difference["metrics"]["accuracy"]["value"]


def test_folds_with_backbones_of_their_own_are_one_setting(
    finished_run: FinishedRun, compared: Callable[..., Any], tmp_path: Path
) -> None:
    folds = tmp_path / "agent" / "0"
    for fold in (0, 1):
        of_fold = {"data__fold": fold, "model__backbone": f"start/{fold}"}
        variant(finished_run, folds / f"fold-{fold}" / "0", **of_fold)
        variant(finished_run, tmp_path / "single" / str(fold), **of_fold)
    options = yaml.safe_load((finished_run.folder / "config.yaml").read_text())
    options["model"]["backbone"] = "start/{fold}"
    (folds / "folds.yaml").write_text(yaml.safe_dump(options | {"folds": "all"}))
    found = compared(tmp_path)["kinds"]["reward"]
    assert [len(one["runs"]) for one in found["settings"].values()] == [2, 1, 1]
    assert found["options"]["model.backbone"] == ["start/{fold}", "start/0", "start/1"]


def test_options_within_options_are_listed_one_by_one() -> None:
    options = {"model": {"scratch": {"hidden_size": 64}, "dropout": 0.1}, "data": {"fold": 2}, "run": {"name": "a"}}
    given = {**options, "trainer": {"strategy": {"class_path": "fully_sharded"}}, "task": "reward"}
    assert settings(given) == {"model.scratch.hidden_size": 64, "model.dropout": 0.1, "task": "reward"}


def test_a_repeated_run_is_a_setting_of_its_own(
    finished_run: FinishedRun, compared: Callable[..., Any], tmp_path: Path
) -> None:
    runs = [variant(finished_run, tmp_path / "runs" / name) for name in ("0", "1")]
    found = compared(*runs, tmp_path / "runs")["kinds"]["reward"]  # and the same folder twice is one run
    assert [one["where"] for one in found["settings"].values()] == list(map(str, runs))
    assert found["differences"][0]["metrics"]["f1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_what_cannot_be_compared_is_left_out_with_its_reason(
    finished_run: FinishedRun, compared: Callable[..., Any], call: Callable[..., Ended], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    variant(finished_run, runs / "good" / "0")
    variant(finished_run, runs / "other" / "0", data__seed=3)
    (variant(finished_run, runs / "old" / "0", model__dropout=0.5) / "decisions.jsonl").unlink()
    (variant(finished_run, runs / "damaged" / "0") / "metrics.json").write_text("{")
    unfinished = variant(finished_run, runs / "unfinished" / "0")
    (unfinished / "metrics.json").unlink()
    (unfinished / "checkpoints").mkdir()
    (unfinished / "checkpoints" / "last.ckpt").touch()
    seen = variant(finished_run, runs / "seen" / "0", model__dropout=0.25)
    record = json.loads((seen / "metrics.json").read_text())
    (seen / "metrics.json").write_text(json.dumps(record | {"notes": ["CONTAMINATED: trained on scenes of the test"]}))

    found = compared(runs)
    reasons = {Path(folder).parent.name: reason for folder, reason in found["left_out"].items()}
    assert reasons.keys() == {"old", "damaged", "unfinished", "seen"}
    assert "an earlier version tested it" in reasons["old"]
    assert "metrics.json: expected JSON" in reasons["damaged"]
    last = unfinished / "checkpoints" / "last.ckpt"
    assert reasons["unfinished"] == f"unfinished; resume with: python -m proactive.fit --ckpt_path {last}"
    assert reasons["seen"].startswith("CONTAMINATED")
    reward = found["kinds"]["reward"]
    assert reward["incomparable"][0]["settings"] == ["A", "B"]
    assert reward["incomparable"][0]["reason"].startswith("no test row in common")
    page = Page(Path("out", "report.html").read_text())
    assert "A and B cannot be compared: no test row in common" in page.text
    for reason in reasons.values():
        assert reason in page.text

    marked = compared(runs, "--contaminated")["kinds"]["reward"]
    assert any(note.startswith("CONTAMINATED: 1 of 3") for note in marked["notes"])
    ended = call(compare.main, unfinished)
    assert ended.code == 2
    assert ended.err.startswith(f"error: no run can be compared: {unfinished}: unfinished")


def test_settings_with_some_rows_in_common_are_compared_on_these(
    finished_run: FinishedRun, compared: Callable[..., Any], tmp_path: Path
) -> None:
    for fold in (0, 1):
        variant(finished_run, tmp_path / "a" / str(fold), data__fold=fold)
    variant(finished_run, tmp_path / "b" / "0", right, model__dropout=0.5)
    found = compared(tmp_path)["kinds"]["reward"]
    alone = found["settings"]["B"]["rows"]
    difference = found["differences"][0]
    assert (difference["rows"], difference["rows_of_one_alone"]) == (alone, alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such folder"),
        (["."], "no run and no evaluation in ."),
        (["RUN/metrics.json"], "is not a folder"),
        (["RUN", "--output=RUN"], "--output: RUN holds other things than `compare` wrote"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, finished_run: FinishedRun, call: Callable[..., Ended], tmp_path: Path
) -> None:
    run = str(finished_run.folder)
    ended = call(compare.main, *(argument.replace("RUN", run) for argument in arguments))
    assert ended.code == 2
    assert message.replace("RUN", run) in ended.err.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_evaluations_under_one_judge_are_paired_and_other_judges_are_refused(
    finished_run: FinishedRun, compared: Callable[..., Any], call: Callable[..., Ended], tmp_path: Path
) -> None:
    judge = ["--judge.checkpoint", str(finished_run.folder), "--data.root=embedded", "--quiet"]
    for baseline in ("always-propose", "never-propose"):
        ended = call(evaluate.main, "agent", f"--agent.baseline={baseline}", *judge, f"--output=evaluations/{baseline}")
        assert (ended.code, ended.err) == (0, "")
    ended = call(
        evaluate.main, "agent", "--agent.traces=evaluations/always-propose/judged", "--judge.recorded",
        "--data.root=embedded", "--quiet", "--output=evaluations/recorded",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    found = compared("evaluations")["kinds"]["evaluation"]
    expected = json.loads(Path("evaluations/always-propose/metrics.json").read_text())["figures"]
    metrics = found["settings"]["A"]["metrics"]
    for name in ("recall", "precision", "accuracy", "false_alarm", "f1"):
        assert metrics[name]["value"] == pytest.approx(expected[name])
        assert metrics[name]["low"] == pytest.approx(expected[f"{name}_low"])
    assert [(one["of"], one["minus"]) for one in found["differences"]] == [("B", "A")]
    assert {tuple(one["settings"]) for one in found["incomparable"]} == {("A", "C"), ("B", "C")}
    assert found["options"]["agent"] == ["always-propose", "never-propose", "recorded"]


def test_the_page_is_accessible_fits_and_shows_text_as_text(
    finished_run: FinishedRun,
    compared: Callable[..., Any],
    browser: Any,  # noqa: F811
    faults: Callable[[Any], list[str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    variant(finished_run, tmp_path / "runs" / "0")
    variant(finished_run, tmp_path / "runs" / "1", right, model__backbone=HOSTILE)
    variant(finished_run, tmp_path / "runs" / "2", data__seed=3, data__fold=1)
    (variant(finished_run, tmp_path / "runs" / "3") / "decisions.jsonl").unlink()
    compared(tmp_path / "runs")
    text = Path("out", "report.html").read_text()
    page = Page(text)
    assert HOSTILE in page.text
    assert not page.handlers
    assert "script" not in page.tags
    assert {"../runs/0/report.html", "../runs/1/report.html"} <= set(page.loaded)
    for width, scheme in ((1280, "light"), (390, "dark")):
        options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        for file in (tmp_path / "out" / "report.html", tmp_path / "runs" / "0" / "report.html"):
            with page_of(browser, file.as_uri(), **options) as opened:
                assert faults(opened) == []
                assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), (file, width)
