"""A whole run: what the run folder holds, what is printed, and that others can use what is left behind."""

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.splits import split_by_scene
from datamodules.prompting.tokenizers import tokenizer_from_state
from models.learning.checkpoint_files import load_checkpoint
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import model_from_checkpoint
from models.learning.training import BackboneModule
from models.reporting.decided_rows import DecidedRow
from proactive import fit
from tests.helpers import ROOT, SMALL_RUN
from tests.models.reporting.test_run_page import Page
from tests.patience import HANG
from tests.proactive.conftest import FinishedRun

LOGGED = ("train/loss", "train/gradient_norm", "validation/auroc", "validation/loss", "test/raw_f1")

OPTIONS = {
    name: {option for owner in owners for option in inspect.signature(owner).parameters} - {"options"}
    for name, owners in {
        "model": (BackboneModule, RewardClassifier),
        "data": (RowsDataModule, RewardDataModule),
    }.items()
}


def test_the_run_folder_is_complete_and_nothing_else(finished_run: FinishedRun) -> None:
    names = {path.relative_to(finished_run.folder).as_posix() for path in finished_run.folder.rglob("*.*")}
    assert names == {
        ".lock",
        "config.yaml",
        "decisions.jsonl",
        "metrics.json",
        "report.html",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "logs/metrics.csv",
        "logs/hparams.yaml",
        "export/config.json",
        "export/model.safetensors",
        "export/proactive.json",
        "export/tokenizer.json",
        "export/tokenizer_config.json",
        "export/README.md",
    }
    assert {path.name for path in finished_run.place.iterdir()} == {"runs", "root", "lock", "said.json"}


def test_a_run_prints_its_data_metrics_and_folder(finished_run: FinishedRun) -> None:
    assert finished_run.err == ""
    assert "\x1b" not in finished_run.out  # plain, for it went to no terminal
    assert "\r" not in finished_run.out
    lines = finished_run.out.splitlines()
    assert lines[0] == f"data: {finished_run.root}, by_scene split, fold 0 of 3: 45 train, 39 validation, 38 test rows"
    assert lines[1].startswith("contamination: 0 of 38 test rows (0%)")
    assert [line.split(",")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1] == "runs/reward/0"
    figures = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))["test"]["calibrated"]
    row = next(line for line in lines if "this model, calibrated" in line)
    assert f"{figures['accuracy']:.4f} [{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}]" in row
    assert f"{figures['f1']:.4f} [{figures['f1_low']:.3f}, {figures['f1_high']:.3f}]" in row
    assert not any("published 8B reward model" in line for line in lines), "other rows than the published ones"
    assert any("bag of words" in line for line in lines)


def test_metrics_json_has_rows_contamination_and_versions(finished_run: FinishedRun) -> None:
    record = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))
    split = split_by_scene(load_corpus(str(finished_run.root)), 3, 0)
    assert record["rows"] == {name: len(getattr(split, name)) for name in ("train", "validation", "test")}
    assert record["contamination"] == {
        "test_rows": len(split.test),
        "contaminated_rows": 0,
        "fraction": 0.0,
        "validated_rows": 0,
        "allowed": False,
    }
    assert record["truncated_rows"] == {"train": 0, "validation": 0, "test": 0}
    assert record["versions"].pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert {"proactive", "torch", "lightning", "transformers", "datasets"} <= set(record["versions"])
    assert record["versions"] == {name: importlib.metadata.version(name) for name in record["versions"]}
    accepted = sum(row.accepted for row in split.test)
    for figures in (record["test"]["raw"], record["test"]["calibrated"]):
        assert figures["tp"] + figures["fn"] == accepted
        assert figures["rows"] == sum(figures[count] for count in ("tp", "fp", "tn", "fn")) == len(split.test)
        assert figures["accuracy"] == pytest.approx((figures["tp"] + figures["tn"]) / len(split.test))


def test_the_report_is_one_self_contained_file(finished_run: FinishedRun) -> None:
    page = (finished_run.folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/svg\+xml;base64,[A-Za-z0-9+/=]{1000,}"', page)) == 4
    linked = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]{1,40})""", page)
    assert all(target.startswith(("data:", "#")) for target in linked)
    assert not re.findall(r"<script|<link|@import|url\(", page)
    record = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))
    assert f"{record['test']['calibrated']['f1']:.4f}"[:5] in page
    test = split_by_scene(load_corpus(str(finished_run.root)), 3, 0).test
    assert any(event.event in page for row in test for event in row.history)  # the worst mistakes, as text


def test_the_model_card_states_metrics_split_and_contamination(finished_run: FinishedRun) -> None:
    card = (finished_run.folder / "export" / "README.md").read_text(encoding="utf-8")
    record = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))
    assert f"{record['test']['calibrated']['accuracy']:.4f}"[:5] in card
    assert "fold 0 of 3" in card
    assert "0 of 38" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"


def test_the_report_states_when_and_how_the_run_was_trained(finished_run: FinishedRun) -> None:
    facts = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))["run"]
    assert facts["seconds"] > 0
    assert datetime.fromisoformat(facts["started"]) < datetime.now(UTC)
    assert facts["options"].keys() == {
        *("model.scratch", "model.learning_rate", "data.root", "data.vocabulary_size", "data.folds", "data.batch_size"),
        *("data.micro_batch_size", "trainer.max_epochs", "trainer.accelerator", "run.checkpoint_every_n_steps"),
    }
    page = Page((finished_run.folder / "report.html").read_text(encoding="utf-8"))
    for text in (
        f"torch {torch.__version__}",
        "CPU",
        "data.vocabulary_size",
        "python -m proactive.compare runs/reward/*",
    ):
        assert text in page.text


def test_each_test_row_is_kept_without_its_text(finished_run: FinishedRun) -> None:
    record = json.loads((finished_run.folder / "metrics.json").read_text(encoding="utf-8"))
    rows = read_jsonl(finished_run.folder / "decisions.jsonl", DecidedRow)
    assert len({row.row for row in rows}) == len(rows) == record["rows"]["test"]
    right = sum((row.probability > 0.5) == bool(row.target) for row in rows)
    assert right / len(rows) == pytest.approx(record["test"]["raw"]["accuracy"])
    by_words = sum((row.bag_of_words > 0.5) == bool(row.target) for row in rows if row.bag_of_words is not None)
    assert by_words / len(rows) == pytest.approx(record["baselines"]["bag of words"]["accuracy"])


def test_config_yaml_has_all_options(finished_run: FinishedRun) -> None:
    """Every option stands there with the value that it had, defaults too."""
    config = yaml.safe_load((finished_run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert config.keys() == {"seed_everything", "trainer", "model", "data", "task", "run"}
    assert config["task"] == "reward"
    assert config["model"].keys() == OPTIONS["model"]
    follow_from_the_model = {"tokenizer", "trust_remote_code"}
    assert config["data"].keys() == OPTIONS["data"] - follow_from_the_model
    assert config["run"] == {
        "root": "runs",
        "name": "reward",
        "checkpoint_every_n_steps": 3,
        "monitor": "validation/auroc",
        "tracker": "none",
        "resumable_best": False,
        "export_dtype": None,
    }
    assert config["seed_everything"] == 0
    assert (config["data"]["root"], config["data"]["batch_size"]) == (str(finished_run.root), 8)
    assert (config["trainer"]["max_epochs"], config["model"]["gradient_clip_norm"]) == (2, 1.0)


def test_the_order_of_rows_follows_seed_everything(finished_run: FinishedRun, tmp_path: Path, call: Callable) -> None:
    options = [*SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=1", "--seed_everything=3"]
    assert call(fit.main, *options, "--quiet").code == 0
    checkpoint = load_checkpoint(tmp_path / "runs" / "reward" / "0" / "checkpoints" / "last.ckpt")
    assert checkpoint["RewardDataModule"]["order_seed"] == 3


def test_the_export_gives_the_same_probabilities_without_this_project(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    """In a process that cannot even see this project's folder first, and imports none of its packages."""
    texts = ["The user opens the editor.\n", "Propose: null", "The user runs the tests of the login form and all pass."]
    script = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
ours = {"proactive", "callbacks", "models", "datamodules"} & set(sys.modules)
labels = model.config.id2label
print(json.dumps([sorted(ours), labels, [row.double().softmax(-1).tolist() for row in logits]]))
"""
    ended = subprocess.run(
        [sys.executable, "-I", "-c", script, finished_run.folder / "export", json.dumps(texts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    ours, labels, probabilities = json.loads(ended.stdout)
    assert ours == []
    assert labels == {"0": "rejected", "1": "accepted"}
    checkpoint = torch.load(finished_run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    classifier = model_from_checkpoint(RewardClassifier, checkpoint).eval()
    tokenizer = tokenizer_from_state(checkpoint["RewardDataModule"]["tokenizer"])
    with torch.no_grad():
        expected = [
            float(classifier(dict(encoded)).double().softmax(-1)[:, 1])
            for encoded in (tokenizer(text, return_tensors="pt") for text in texts)
        ]
    assert len(set(expected)) == len(texts)  # no constant, which would agree by itself
    assert [accepted for _, accepted in probabilities] == pytest.approx(expected, abs=1e-6)


def test_help_documents_each_option_and_imports_no_more_than_it_needs() -> None:
    """What torchmetrics imports by itself (transformers, matplotlib) cannot be helped; the rest is for a run."""
    script = """
import sys
import torchmetrics.functional.classification, lightning.pytorch.cli
theirs = set(sys.modules)
from proactive import fit
try:
    fit.main(["--help"])
finally:
    heavy = ("datasets", "sklearn", "bitsandbytes", "tensorboard", "pandas")
    print("imported:", [name for name in heavy if name in set(sys.modules) - theirs])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    assert ended.stdout.splitlines()[-1] == "imported: []"
    shown = " ".join(ended.stdout.split())
    for name, options in OPTIONS.items():
        for option in options - {"tokenizer", "trust_remote_code"} if name == "data" else options:
            assert f"--{name}.{option} " in shown
    assert "Maximum number of tokens of a row. The oldest events are dropped first." in shown
    assert "Optimizer steps between saves of last.ckpt." in shown
