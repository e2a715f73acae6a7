"""A GGUF file as the backbone of a run: trained, planned and inspected; what loads if it is gone or has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import proactive
from datamodules.backbones import gguf
from datamodules.backbones.packaged import backbone_source
from datamodules.corpus.sources import load_corpus
from proactive import evaluate, export, fit, inspect, plan
from tests.gguf_files import small_llama, write_gguf

EVENTS = ["The user opens editor.py", "The user runs the tests", "Two tests fail"]
RUN = ["--data.folds=3", "--data.batch_size=8", "--data.max_length=400", "--data.cache=false"]
STEPS = ["--trainer.max_steps=2", "--trainer.accelerator=cpu"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "huggingface"))
    gguf._converted.cache_clear()
    return tmp_path / "huggingface"


@pytest.fixture
def file(root: Path, tmp_path: Path, cache: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf", *small_llama(load_corpus(str(root)).train))


def remove(file: Path, cache: Path) -> None:
    """Remove a GGUF file and its conversion."""
    file.unlink()
    shutil.rmtree(cache)
    gguf._converted.cache_clear()


def score(path: Path) -> float:
    found = proactive.load_judge(path).score(EVENTS, "Offer help")
    assert isinstance(found, float)
    return found


def test_a_run_on_a_gguf_file_loads_without_it(
    call: Callable, root: Path, file: Path, cache: Path, tmp_path: Path
) -> None:
    ended = call(inspect.main, "--root", root, "--folds", "3", "--tokenizer", file, "--json")
    assert ended.code == 0, ended.err
    options = [f"--model.backbone={file}", "--model.freeze_layers=1", f"--data.root={root}", *RUN]
    ended = call(plan.main, *options, "--output", tmp_path / "plan.json")
    assert ended.code == 0, ended.err
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["backbone"] == planned["tokens_counted_by"] == str(file)
    assert 0 < planned["trained_parameters"] < planned["parameters"]

    ended = call(fit.main, *options, *STEPS)
    assert ended.code == 0, ended.err
    assert "converting" not in ended.err + ended.out, "inspect has converted it"
    run = tmp_path / "runs" / "reward" / "0"
    assert "base_model: small.gguf" in (run / "export" / "README.md").read_text()

    remove(file, cache)
    assert score(run) == score(run / "export")
    assert 0 < score(run) < 1


def test_an_adapter_on_a_gguf_file_needs_it_unless_it_is_merged(
    call: Callable, root: Path, file: Path, cache: Path, tmp_path: Path
) -> None:
    adapter = ["--model.adapter.rank=16", "--model.learning_rate=1e-2"]
    options = [f"--model.backbone={file}", *adapter, f"--data.root={root}", *RUN, *STEPS]
    for name in ("alone", "merged"):
        merge = f"--model.adapter.merge={str(name == 'merged').lower()}"
        ended = call(fit.main, *options, merge, f"--run.name={name}")
        assert ended.code == 0, ended.err
    run, merged = tmp_path / "runs" / "alone" / "0", tmp_path / "runs" / "merged" / "0"
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.endswith("score.weight") for name in weights)

    exported = json.loads((run / "export" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == backbone_source(str(file))
    said = (run / "export" / "README.md").read_text()
    assert "names its backbone, the folder to which `small.gguf` was converted." in said
    assert "The backbone was a local file." in said
    ended = call(export.main, "--checkpoint", run, "--output", "later")
    assert ended.code == 0, ended.err
    kept = [folder / "adapter_model.safetensors" for folder in (run / "export", tmp_path / "later")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    figures = json.loads((run / "metrics.json").read_text())["test"]["raw"]
    for checkpoint in (run, run / "export"):
        ended = call(evaluate.main, "reward", "--checkpoint", checkpoint, "--output", "found.json")
        assert ended.code == 0, ended.err
        found = json.loads((tmp_path / "found.json").read_text())["test"]["raw"]
        assert found == pytest.approx(figures, abs=1e-5)
    expected = score(run)
    assert [score(run / "export"), score(merged)] == [expected, expected]
    assert score(merged / "export") == pytest.approx(expected, abs=1e-5)

    network, tokenizer = small_llama(load_corpus(str(root)).train)
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    write_gguf(file, network, tokenizer)
    resume = (fit.main, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
    loading = (evaluate.main, "reward", "--checkpoint", run), (evaluate.main, "reward", "--checkpoint", run / "export")
    for command in (*loading, resume):
        ended = call(*command)
        assert ended.code == 2
        assert (
            f"the adapter's base was {file}, and {file} has other weights now\n  help: Put the base back" in ended.err
        )

    remove(file, cache)
    for command in loading:
        ended = call(*command)
        assert ended.code == 2
        assert f"its base is missing: model.backbone: {file}: No such file" in ended.err
        assert f"help: Put {file} back where it was, or use an export with model.adapter.merge true" in ended.err
    ended = call(*resume)
    assert (ended.code, ended.err.count(f"error: model.backbone: {file}: No such file or directory\n")) == (2, 1)
    assert score(merged / "export") == pytest.approx(expected, abs=1e-5)
