"""Fits spread over two processes, as a person starts them: one of them dies, and the run goes on."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from models.learning.checkpoint_files import load_run
from models.learning.reward_classifier import RewardClassifier
from proactive import evaluate, export, fit
from tests.helpers import SMALL_BACKBONE, SMALL_RUN, command, small_root

NO_DROPOUT = f"--model.scratch={json.dumps({**SMALL_BACKBONE, 'attention_dropout': 0.0})}"  # ranks draw differently
ON_TWO = ["--trainer.strategy=fully_sharded", "--trainer.devices=2"]
TORCHRUN = ("--standalone", "--nproc-per-node=2", "-m", "proactive.fit")


def kill(rank: int, step: int) -> str:
    callback = {"class_path": "tests.helpers.KillRankAtStep", "init_args": {"step": step, "rank": rank}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]["raw"]


def test_a_killed_rank_ends_the_job_and_the_resumed_job_trains_like_one_device(tmp_path: Path, call: Callable) -> None:
    root = small_root(tmp_path / "root")
    options = [*SMALL_RUN, NO_DROPOUT, f"--data.root={root}"]
    ended = command("proactive.fit", *options, *ON_TWO, kill(1, 5), "--run.name=two", cwd=tmp_path)
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if line.startswith(("error:", "  help:"))]
    assert "rank 1 (process " in told[0]
    assert "was killed by SIGKILL" in told[0]
    last = Path("runs/two/0/checkpoints/last.ckpt")
    assert str(last) in told[1]

    resume = (f"--ckpt_path={last}", "--trainer.callbacks=null", "--quiet")
    ended = command("torch.distributed.run", *TORCHRUN, *resume, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "runs/two/0\n"), ended.stderr
    assert command("proactive.fit", *options, "--run.name=one", cwd=tmp_path).returncode == 0
    one, two = tmp_path / "runs" / "one" / "0", tmp_path / "runs" / "two" / "0"
    checkpoints = [load_run(folder / "checkpoints" / "last.ckpt", RewardClassifier) for folder in (one, two)]
    assert [checkpoint["global_step"] for checkpoint in checkpoints] == [12, 12]
    for name, weight in checkpoints[0]["state_dict"].items():
        found = checkpoints[1]["state_dict"][name]
        assert float((found - weight).norm() / weight.norm()) < 1e-4, name  # after twelve steps of Adam
    assert figures(two) == pytest.approx(figures(one), abs=1e-4)

    # What ranks left behind serves those who have one device.
    assert call(evaluate.main, "reward", "--checkpoint", two, "--output", "found.json").code == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert Path(found["weights"]) == two / "checkpoints" / "best.ckpt"
    parts = [{path.name for path in (two / "checkpoints" / name).iterdir()} for name in ("last.ckpt", "best.ckpt")]
    assert parts == [{"weights", "optimizer", "values.pt"}, {"weights", "values.pt"}]
    assert found["test"]["raw"] == pytest.approx(figures(two), abs=1e-5)
    for checkpoint, output in ((two, "of ranks"), (one, "of one")):
        ended = call(export.main, "--checkpoint", checkpoint, "--output", output)
        assert (ended.code, ended.err) == (0, "")
        at_the_end = AutoModelForSequenceClassification.from_pretrained(checkpoint / "export").state_dict()
        later = AutoModelForSequenceClassification.from_pretrained(tmp_path / output).state_dict()
        assert at_the_end.keys() == later.keys()
        assert all(torch.equal(later[name], weight) for name, weight in at_the_end.items())
        config = json.loads((checkpoint / "export" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert (tmp_path / output / "README.md").read_text() == (checkpoint / "export" / "README.md").read_text()


def test_when_rank_0_is_killed_the_others_end(tmp_path: Path) -> None:
    """They hold the pipe that is waited for here."""
    options = [*SMALL_RUN, f"--data.root={small_root(tmp_path / 'root')}"]
    ended = command("proactive.fit", *options, *ON_TWO, kill(0, 2), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    assert "rank 0 (process " in ended.stderr


def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    """It is rank 0's own, with its exit code, not the news of another one's end."""
    options = [f"--data.root={small_root(tmp_path / 'root')}", *ON_TWO, "--trainer.accelerator=cpu"]
    ended = command("proactive.fit", *options, "--model.optimizer=paged_adamw_8bit", cwd=tmp_path)
    assert ended.returncode == 2
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "model.optimizer: paged_adamw_8bit" in told[0]
    assert not (tmp_path / "runs" / "reward" / "0").exists()


def test_a_strategy_whose_checkpoints_are_pickles_is_refused(call: Callable) -> None:
    strategy = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
    ended = call(fit.main, f"--trainer.strategy={strategy}", "--trainer.accelerator=cpu")
    assert ended.code == 2
    what, hint = ended.err.splitlines()
    assert "ModelParallelStrategy" in what
    assert hint.startswith("  help: ")
