"""The export command: what it writes is what the run itself wrote, with metrics of these weights or none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from callbacks.checkpoint_io import SafeCheckpointIO
from models.learning.checkpoint_files import load_checkpoint
from models.learning.checkpoint_paths import EXPORT_STATE
from models.learning.reward_classifier import RewardClassifier
from proactive import export, load_judge
from tests.proactive.conftest import FinishedRun


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("what", [".", "checkpoints/best.ckpt"])
def test_export_writes_the_export_of_the_run(
    finished_run: FinishedRun, call: Callable, tmp_path: Path, what: str
) -> None:
    ended = call(export.main, "--checkpoint", finished_run.folder / what, "--output", "out", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "out\n", "")
    found, expected = contents(tmp_path / "out"), contents(finished_run.folder / "export")
    assert found.keys() == expected.keys()
    said = [json.loads(files.pop("tokenizer_config.json")) for files in (found, expected)]
    for options in said:
        assert options.pop("padding_side", "right") == "right"  # as it is where nothing is said
        assert options.pop("chat_template", None) is None
    assert said[0] == said[1]
    state, own_state = (json.loads(files.pop(EXPORT_STATE)) for files in (found, expected))
    assert state == own_state
    for name in expected:
        assert found[name] == expected[name], name


def test_weights_are_rounded_to_bfloat16_if_asked(finished_run: FinishedRun, call: Callable, tmp_path: Path) -> None:
    ended = call(export.main, "--checkpoint", finished_run.folder, "--output", "out", "--dtype=bfloat16")
    assert (ended.code, ended.err) == (0, "")
    folders = tmp_path / "out", finished_run.folder / "export"
    found, exact = map(AutoModelForSequenceClassification.from_pretrained, folders)
    assert (found.dtype, found.config.dtype) == (torch.bfloat16, torch.bfloat16)
    for name, weight in exact.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.bfloat16()), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[0] < 0.55 * sizes[1]
    assert "rounded to bfloat16" in (tmp_path / "out" / "README.md").read_text()
    event = ["The user opens parse_rows.py."]
    scores = [load_judge(folder).score(event, "Explain it.") for folder in ("out", finished_run.folder)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_other_weights_under_the_same_name_do_not_get_the_metrics(
    finished_run: FinishedRun, call: Callable, tmp_path: Path
) -> None:
    """As when a resumed run has found better ones, and was stopped before its test."""
    run = tmp_path / "run"
    shutil.copytree(finished_run.folder, run)
    best = run / "checkpoints" / "best.ckpt"
    assert call(export.main, "--checkpoint", run, "--output", "before").code == 0
    checkpoint = load_checkpoint(best)
    checkpoint["calibration"] = checkpoint["calibration"] | {"temperature": 3.25}
    weights = checkpoint["state_dict"]
    name = next(name for name, weight in weights.items() if weight.ndim > 1)
    weights[name] = torch.zeros_like(weights[name])
    SafeCheckpointIO(RewardClassifier).save_checkpoint(checkpoint, best)
    assert call(export.main, "--checkpoint", run, "--output", "after").code == 0
    cards = [(tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("before", "after")]
    assert ["## Metrics" in card for card in cards] == [True, False]
    assert json.loads((tmp_path / "after" / EXPORT_STATE).read_text())["calibration"]["temperature"] == 3.25


def test_a_folder_that_is_no_export_is_refused_before_anything_is_loaded(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("all of it")
    (tmp_path / "no.ckpt").touch()
    ended = call(export.main, "--checkpoint", "no.ckpt", "--output", "thesis")
    assert ended.code == 2
    assert ended.err.splitlines()[0] == "error: thesis exists and is not an export of this project"
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "all of it"
