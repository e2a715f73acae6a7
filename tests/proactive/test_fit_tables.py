"""The fit command on tables: the run equals that on the same rows in the published layout."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from datamodules.corpus.sources import load_corpus
from proactive import evaluate, fit
from tests.helpers import SMALL_RUN
from tests.proactive.conftest import FinishedRun

COLUMNS = ["--data.columns.history=events", "--data.columns.proposal=offer", "--data.columns.accepted=ok"]
NAMES = ("events", "offer", "ok", "annotators", "help_needed", "note")


def write_tables(folder: Path, root: Path) -> dict[str, Path]:
    """Write the rows of a root as train.csv and test.csv in a folder, and as one Parquet file beside it."""
    corpus = load_corpus(str(root))
    folder.mkdir()
    every: list[dict[str, Any]] = []
    for name, rows in (("train", corpus.train), ("test", corpus.test)):
        cells = [
            ([event.model_dump() for event in row.history], row.proposal, row.accepted, list(row.annotation))
            for row in rows
        ]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(NAMES)
            for (events, offer, accepted, annotators), row in zip(cells, rows, strict=True):
                writer.writerow(
                    [json.dumps(events), offer, int(accepted), json.dumps(annotators), row.help_needed, "not read"]
                )
        every += [dict(zip(NAMES, cell, strict=False)) for cell in cells]
    parquet.write_table(pyarrow.Table.from_pylist(every), folder.with_suffix(".parquet"))
    return {"csv": folder, "parquet": folder.with_suffix(".parquet")}


def test_a_run_on_tables_equals_that_on_the_same_rows(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    tables = write_tables(tmp_path / "tables", finished_run.root)
    ended = call(fit.main, *SMALL_RUN, f"--data.root={tables['csv']}", *COLUMNS)
    assert (ended.code, ended.err) == (0, "")
    trained = len(load_corpus(str(finished_run.root)).train)
    assert f"data.root: {tables['csv']}/train.csv: {trained} rows; columns not read: note" in ended.out
    run = tmp_path / "runs" / "reward" / "0"
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, finished_run.folder))
    for same in ("test", "calibration", "contamination", "rows"):
        assert found[same] == expected[same], same
    assert found["data"]["digests"] == expected["data"]["digests"]
    assert len(set(found["data"]["digests"].values())) == 3
    assert (len(found["data"]["read"]), expected["data"]["read"]) == (3, [])

    def evaluated(*arguments: str) -> dict[str, Any]:
        ended = call(evaluate.main, "reward", f"--checkpoint={run}", "--output=m.json", *arguments)
        assert (ended.code, ended.err) == (0, "")
        return json.loads((tmp_path / "m.json").read_text())

    for record in (evaluated(), evaluated(f"--data.root={tables['parquet']}", *COLUMNS)):
        assert record["test"]["raw"] == pytest.approx(expected["test"]["raw"], abs=1e-6)
        assert record["data"]["digests"] == expected["data"]["digests"]
        assert record["baselines"] == expected["baselines"]
    elsewhere = evaluated(f"--data.root={finished_run.root}")  # which has no columns
    assert elsewhere["data"]["digests"] == expected["data"]["digests"]
