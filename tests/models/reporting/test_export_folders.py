"""The export: whole or not there, and read by transformers alone as this project reads it."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoTokenizer

from callbacks.export_model import ExportModel
from datamodules.errors import UserError
from datamodules.files.run_folders import EXPORT
from datamodules.prompting.segments import Data
from datamodules.prompting.templates import render
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import model_from_export
from models.reporting.export_folders import export_model
from models.reporting.run_record import run_record
from tests.models.reporting.conftest import Run
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
    read = [len(ids) for ids in run.data.encoded["test"].input_ids]
    rows = [row for row, text in texts.items() if len(run.data.tokenizer(text).input_ids) == read[row]][:5]
    assert len(rows) == 5, "rows that lost no event"
    found = in_another_process(run.folder / "export", [texts[row] for row in rows], tmp_path)
    assert found["ours"] == []
    assert found["labels"] == {"0": "rejected", "1": "accepted"}
    assert found["ids"] == [list(map(int, run.data.encoded["test"].input_ids[row])) for row in rows]
    tested = run.classifier.test_rows
    by_row = dict(zip(tested["row"].tolist(), tested["probability"].tolist(), strict=True))
    expected = [by_row[row] for row in rows]
    assert max(expected) - min(expected) > 1e-4, "rows that differ"
    assert found["together"] == pytest.approx(expected, abs=1e-6)
    assert found["alone"] == pytest.approx(expected, abs=1e-6)


def test_the_export_contains_safetensors_tokenizer_and_card_and_no_pickle(run: Run) -> None:
    names = {path.name for path in (run.folder / "export").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")], "nothing unfinished"


def test_this_project_reads_its_export_back(run: Run) -> None:
    classifier, state = model_from_export(RewardClassifier, run.folder / "export")
    batch = next(iter(run.data.test_dataloader()))[0]
    assert torch.equal(probabilities(classifier, batch), probabilities(run.classifier, batch))
    assert classifier.calibration == run.classifier.calibration is not None
    assert state["training_rows"] == run.data.state_dict()["training_rows"]


def test_the_export_of_a_checkpoint_has_the_tokenizer_of_the_run(run: Run, tmp_path: Path) -> None:
    """With its chat template, in which agents are spoken to."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    state = run.data.state_dict()
    state = json.loads(json.dumps(state | {"tokenizer": state["tokenizer"] | {"chat_template": template}}))
    export_model(run.classifier, type(run.data).from_state(state), None, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == template


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_export_replaces_the_old_one(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_model(run.classifier, run.data, None, folder)
    (folder / "stale.safetensors").touch()
    state = json.loads((folder / "proactive.json").read_text())
    (folder / "proactive.json").write_text(json.dumps(state | {"files": [*state["files"], "stale.safetensors"]}))
    export_model(run.classifier, run.data, None, folder)
    assert sorted(path.name for path in folder.iterdir()) == state["files"]


def test_files_of_the_user_in_an_export_are_kept(run: Run, tmp_path: Path) -> None:
    """Files and folders, links, and a file that has the name of one that only the new export has."""
    folder = tmp_path / "export"
    export_model(run.classifier, run.data, None, folder)
    state = json.loads((folder / "proactive.json").read_text())
    state["files"].remove("tokenizer_config.json")
    (folder / "proactive.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text("mine")
    (folder / ".git" / "refs").mkdir(parents=True)
    (folder / ".git" / "refs" / "main").write_text("0123")
    (folder / "notes.txt").write_text("thoughts")
    (folder / "link").symlink_to("nowhere")
    for _ in range(2):
        export_model(run.classifier, run.data, None, folder)
        kept = contents(folder)
        assert kept["notes.txt"] == b"thoughts"
        assert kept[".git/refs/main"] == b"0123"
        assert kept["tokenizer_config.json.kept"] == b"mine"
        assert json.loads(kept["tokenizer_config.json"])
        assert os.readlink(folder / "link") == "nowhere"


@pytest.mark.parametrize("made", ["folder", "file", "other json"])
def test_a_folder_that_is_not_an_export_is_refused_and_unchanged(run: Run, tmp_path: Path, made: str) -> None:
    place = tmp_path / "mine"
    if made == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / ("proactive.json" if made == "other json" else "thesis.tex")).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is not an export of this project"):
        export_model(run.classifier, run.data, None, place)
    assert contents(tmp_path) == before
    if made == "folder":
        place.rename(tmp_path / EXPORT)
        with pytest.raises(UserError, match="is not an export of this project"):
            ExportModel(tmp_path).setup(run.classifier.trainer, run.classifier, "fit")


def test_an_export_to_a_link_is_written_to_its_target(run: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        export_model(run.classifier, run.data, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_an_export_exists_at_any_moment(run: Run, tmp_path: Path) -> None:
    """Somebody who looks all the time while it is replaced always finds a whole one."""
    folder, stop = tmp_path / "export", threading.Event()
    export_model(run.classifier, run.data, None, folder)
    looked, missed = 0, 0

    def look() -> None:
        nonlocal looked, missed
        while not stop.is_set():
            looked += 1
            missed += not (folder / "model.safetensors").exists()

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(20):
        export_model(run.classifier, run.data, None, folder)
    stop.set()
    watcher.join()
    assert looked > 100
    assert missed == 0


def test_a_failed_export_keeps_the_old_one(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    record = run_record(run.classifier, run.data, "weights")
    export_model(run.classifier, run.data, record, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(jinja2.UndefinedError):
        export_model(run.classifier, run.data, {"task": "reward", "split": ""}, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_model(run.classifier, run.data, record, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "the next one clears up"


def test_the_card_states_metrics_split_and_contamination(run: Run) -> None:
    record = run_record(run.classifier, run.data, "weights")
    card = (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    names = ("accuracy", "precision", "recall", "f1", "auroc", "calibration_error", "acceptance_rate")
    for name in (*names, "people_acceptance_rate", "agreement_false_alarm"):
        cells = " | ".join(f"{record['test'][reading][name]:.4f}" for reading in ("raw", "calibrated", "f1_optimal"))
        assert f"| {name} | {cells} |" in card
    assert run.data.description.removeprefix(str(Path(run.data.root).parent) + "/") in card
    assert f"{len(run.data.split.train)} training" in card
    assert f"{len(run.data.split.test)} test rows" in card
    contamination = run.data.contamination
    assert f"{contamination.contaminated_rows} of {contamination.test_rows} test rows have a history" in card
    calibrated = record["test"]["calibrated"]
    assert f"accuracy {calibrated['accuracy_low']:.4f} to {calibrated['accuracy_high']:.4f}" in card
    assert f"{run.classifier.temperature:.6g}" in card


def test_an_encoder_is_exported_as_well(root: Path, tmp_path: Path) -> None:
    classifier, data = small_classifier("bert"), small_data(root, max_length=120)
    trainer = fit(classifier, data, max_steps=3)
    trainer.test(classifier, data, verbose=False)
    export_model(classifier, data, run_record(classifier, data, "weights"), tmp_path / "export")
    again, _ = model_from_export(RewardClassifier, tmp_path / "export")
    batch = next(iter(data.test_dataloader()))[0]
    assert torch.equal(probabilities(again, batch), probabilities(classifier, batch))
