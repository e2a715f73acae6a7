"""A GGUF file as the backbone of a run: trained, planned and inspected; its run loads where the file is gone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import proactive
from datamodules.backbones import gguf
from datamodules.corpus.sources import load_corpus
from proactive import fit, inspect, plan
from tests.gguf_files import small_llama, write_gguf

EVENTS = ["The user opens editor.py", "The user runs the tests", "Two tests fail"]


def test_a_run_on_a_gguf_file_loads_without_it(
    call: Callable, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "huggingface"))
    gguf._converted.cache_clear()
    file = write_gguf(tmp_path / "small.gguf", *small_llama(load_corpus(str(root)).train))

    ended = call(inspect.main, "--root", root, "--folds", "3", "--tokenizer", file, "--json")
    assert ended.code == 0, ended.err
    options = [f"--model.backbone={file}", "--model.freeze_layers=1", "--data.folds=3", "--data.batch_size=8"]
    options += ["--data.root", root, "--data.max_length=400", "--data.cache=false"]
    ended = call(plan.main, *options, "--output", tmp_path / "plan.json")
    assert ended.code == 0, ended.err
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["backbone"] == planned["tokens_counted_by"] == str(file)
    assert 0 < planned["trained_parameters"] < planned["parameters"]

    ended = call(fit.main, *options, "--trainer.max_steps=2", "--trainer.accelerator=cpu")
    assert ended.code == 0, ended.err
    assert "converting" not in ended.err + ended.out, "inspect has converted it"
    run = tmp_path / "runs" / "reward" / "0"
    assert "base_model: small.gguf" in (run / "export" / "README.md").read_text()

    file.unlink()
    shutil.rmtree(tmp_path / "huggingface")
    gguf._converted.cache_clear()
    scores = {proactive.load_judge(path).score(EVENTS, "Offer help") for path in (run, run / "export")}
    assert len(scores) == 1
    assert 0 < scores.pop() < 1
