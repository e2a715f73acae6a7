"""The export: whole or not there, and read by transformers alone as this project reads it."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml

from callbacks.export import export_model, model_card
from callbacks.record import run_record
from datamodules.prompts import Data, render
from models.reward import RewardClassifier
from tests.callbacks.conftest import Run
from tests.models.small import fit, probabilities, small_classifier, small_data
from tests.patience import HANG

ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.double().softmax(-1)[:, 1]
    alone = [model(**tokenizer(text, return_tensors="pt")).logits.double().softmax(-1)[0, 1].item() for text in texts]
ours = sorted({name.partition(".")[0] for name in sys.modules} & {"proactive", "callbacks", "models", "datamodules"})
print(json.dumps({
    "ours": ours, "labels": model.config.id2label, "ids": tokenizer(texts).input_ids,
    "together": together.tolist(), "alone": alone,
}))
"""


def in_another_process(folder: Path, texts: list[str], cwd: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, folder],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def prompt(run: Run, row: int) -> str:
    segments = render(run.data.template, run.data.split.test[row])
    return "".join(part.text if isinstance(part, Data) else part for segment in segments for part in segment)


def test_transformers_alone_gives_the_same_probabilities(run: Run, tmp_path: Path) -> None:
    """From text to P(accepted), of single rows and of padded batches, in a process without this project."""
    texts = {row: prompt(run, row) for row in range(len(run.data.split.test))}
    rows = [row for row, text in texts.items() if len(run.data.tokenizer(text).input_ids) <= run.data.max_length][:6]
    assert len(rows) == 6, "rows that lost no event"
    found = in_another_process(run.folder / "export", [texts[row] for row in rows], tmp_path)
    assert found["ours"] == []
    assert found["labels"] == {"0": "rejected", "1": "accepted"}
    assert found["ids"] == [list(map(int, run.data._encoded["test"].input_ids[row])) for row in rows]
    tested = run.classifier.test_rows
    by_row = dict(zip(tested["row"].tolist(), tested["probability"].tolist(), strict=True))
    expected = [by_row[row] for row in rows]
    assert max(expected) - min(expected) > 1e-4, "rows that differ"
    assert found["together"] == pytest.approx(expected, abs=1e-6)
    assert found["alone"] == pytest.approx(expected, abs=1e-6)


def test_the_export_holds_safetensors_tokenizer_and_card_and_no_pickle(run: Run) -> None:
    names = {path.name for path in (run.folder / "export").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")], "nothing unfinished"


def test_this_project_reads_its_export_back(run: Run) -> None:
    classifier, state = RewardClassifier.from_export(run.folder / "export")
    batch = next(iter(run.data.test_dataloader()))[0]
    assert torch.equal(probabilities(classifier, batch), probabilities(run.classifier, batch))
    assert (classifier.temperature, classifier.threshold) == (run.classifier.temperature, run.classifier.threshold)
    assert state["training_rows"] == run.data.state_dict()["training_rows"]


def test_a_new_export_takes_the_place_of_the_old_one(run: Run, tmp_path: Path) -> None:
    record = run_record(run.classifier, run.data, "weights")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "stale.bin").touch()
    export_model(run.classifier, run.data, record, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (run.folder / "export").iterdir()}


def test_an_export_that_fails_keeps_the_former_one(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    record = run_record(run.classifier, run.data, "weights")
    export_model(run.classifier, run.data, record, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(jinja2.UndefinedError):
        export_model(run.classifier, run.data, {"task": "reward"}, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_model(run.classifier, run.data, record, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "the next one clears up"


def test_the_card_states_figures_split_and_contamination(run: Run) -> None:
    record = run_record(run.classifier, run.data, "weights")
    card = (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    for name in ("accuracy", "precision", "recall", "f1", "auroc", "calibration_error", "agreement_false_alarm"):
        cells = " | ".join(f"{record['test'][reading][name]:.4f}" for reading in ("raw", "calibrated"))
        assert f"| {name} | {cells} |" in card
    assert run.data.description in card
    assert f"{len(run.data.split.train)} training" in card
    assert f"{len(run.data.split.test)} test rows" in card
    contamination = run.data.contamination
    assert f"{contamination.contaminated_rows} of {contamination.test_rows} test rows have a history" in card
    calibrated = record["test"]["calibrated"]
    assert f"accuracy {calibrated['accuracy_low']:.4f} to {calibrated['accuracy_high']:.4f}" in card
    assert f"{run.classifier.temperature:.6g}" in card


@pytest.mark.parametrize("text", ["x\n---\nlicense: none\n---\n", "---", "`{{ 7 * 7 }}` {% raw %}", "é\u2028:\t- '\""])
def test_options_cannot_change_what_the_card_declares(run: Run, text: str) -> None:
    """A path or a hub id is text: never front matter, never part of a template."""
    record = deepcopy(run_record(run.classifier, run.data, text)) | {"backbone": text, "split": text}
    card = model_card(record, {"pooling": "auto"})
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "proactive-assistant", "proactivebench"],
    }
    assert text in card


@pytest.mark.parametrize(("pooling", "warned"), [("auto", False), ("mean", True), ("cls", True), ("last", True)])
def test_the_card_warns_where_transformers_pools_otherwise(run: Run, pooling: str, warned: bool) -> None:
    card = model_card(run_record(run.classifier, run.data, "weights"), {"pooling": pooling})
    assert (f"trained with pooling `{pooling}`" in card) == warned


def test_an_encoder_is_exported_as_well(root: Path, tmp_path: Path) -> None:
    classifier, data = small_classifier("bert"), small_data(root, max_length=120)
    trainer = fit(classifier, data, max_steps=3)
    trainer.test(classifier, data, verbose=False)
    export_model(classifier, data, run_record(classifier, data, "weights"), tmp_path / "export")
    again, _ = RewardClassifier.from_export(tmp_path / "export")
    batch = next(iter(data.test_dataloader()))[0]
    assert torch.equal(probabilities(again, batch), probabilities(classifier, batch))
