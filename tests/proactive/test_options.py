"""What options become: defaults that follow from others, several configurations, loggers of the user's own."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.files.run_folders import EmptyFolderGuard
from proactive import fit
from proactive.fitting import cli
from proactive.fitting.configs import task_of
from tests.helpers import SMALL_RUN
from tests.proactive.conftest import FinishedRun

BY_CLASS = "lightning.pytorch.loggers"


def printed(call: Callable, *arguments: str) -> dict[str, Any]:
    """What --print_config prints."""
    ended = call(fit.main, *arguments)
    assert (ended.code, ended.err) == (0, "")
    return yaml.safe_load(ended.out)


@pytest.mark.parametrize(
    ("options", "rate", "usual_for"),
    [
        ([], 1e-3, "a backbone from scratch"),
        (["--model.backbone=EXPORT"], 2e-5, "a pretrained backbone"),
        (["--model.backbone=EXPORT", "--model.adapter.rank=2"], 1e-4, "an adapter"),
        (["--model.backbone=EXPORT", "--model.learning_rate=3e-4"], 3e-4, None),
    ],
    ids=["scratch", "pretrained", "adapter", "given"],
)
def test_the_default_learning_rate_depends_on_what_is_trained_and_is_stored(
    options: list[str], rate: float, usual_for: str | None, call: Callable, finished_run: FinishedRun, tmp_path: Path
) -> None:
    given = [option.replace("EXPORT", str(finished_run.folder / "export")) for option in options]
    ended = call(fit.main, *SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=1", *given)
    assert (ended.code, ended.err) == (0, "")
    said = [line for line in ended.out.splitlines() if line.startswith("model.learning_rate")]
    assert said == ([] if usual_for is None else [f"model.learning_rate: {rate:g}, the default for {usual_for}"])
    folder = tmp_path / "runs" / "reward" / "0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["learning_rate"] == rate
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == rate
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == rate
    assert yaml.safe_load((folder / "logs" / "hparams.yaml").read_text())["learning_rate"] == rate


def test_a_later_configuration_changes_fields_of_a_mapping_as_the_command_line_does(
    call: Callable, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    strategy = {"class_path": "callbacks.fully_sharded.FullySharded", "init_args": {"replicas": 2}}
    model = {
        "adapter": {"rank": 4, "targets": ["q_proj"]},
        "scratch": {"model_type": "llama", "hidden_size": 32, "rope_parameters": {"rope_type": "default", "a": 1}},
        "category_weights": {"missed_need": 2.0},
    }
    first.write_text(yaml.safe_dump({"model": model, "trainer": {"strategy": strategy}}))
    changes = {
        "adapter": {"alpha": 8},
        "scratch": {"hidden_size": 64, "rope_parameters": {"a": 2}},
        "category_weights": {"false_alarm": 3.0},
    }
    second.write_text(yaml.safe_dump({"model": changes, "trainer": {"strategy": {"init_args": {"replicas": 4}}}}))
    on_the_command_line = [
        "--model.adapter.alpha=8",
        "--model.scratch.hidden_size=64",
        '--model.scratch.rope_parameters={"rope_type": "default", "a": 2}',
        "--model.category_weights.false_alarm=3.0",
        "--trainer.strategy.init_args.replicas=4",
    ]
    merged = printed(call, f"--config={first}", f"--config={second}", "--print_config")
    assert merged == printed(call, f"--config={first}", *on_the_command_line, "--print_config")
    assert (merged["model"]["adapter"]["rank"], merged["model"]["adapter"]["alpha"]) == (4, 8)
    assert merged["model"]["scratch"] == {
        "model_type": "llama",
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "a": 2},
    }
    assert merged["model"]["category_weights"] == {"missed_need": 2.0, "false_alarm": 3.0}
    second.write_text("model: {scratch: null}\n")
    assert printed(call, f"--config={first}", f"--config={second}", "--print_config")["model"]["scratch"] is None


@pytest.mark.parametrize("how", ["--print_config", "--print_config=skip_default"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_printed_configuration_keeps_the_task(how: str, order: int, call: Callable, tmp_path: Path) -> None:
    """So that it gives the same run again; also where an earlier file and the command line differ."""
    for arguments in (["--task=agent"], ["--config=agent.yaml"], ["--config=reward.yaml", "--task=agent"]):
        for task in ("agent", "reward"):
            (tmp_path / f"{task}.yaml").write_text(f"task: {task}\n")
        content = printed(call, *[*arguments, how][::order])
        assert content["task"] == "agent"
        (tmp_path / "printed.yaml").write_text(yaml.safe_dump(content))
        assert task_of(["--config=printed.yaml"]) == "agent"
        assert printed(call, "--config=printed.yaml", how) == content


def test_a_logger_by_class_is_added_to_the_csv_file_of_the_report(
    call: Callable, finished_run: FinishedRun, tmp_path: Path
) -> None:
    own = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "elsewhere", "name": "", "version": ""}}
    options = [*SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    for number, (logger, others) in enumerate([(own, ["elsewhere"]), ([own], ["elsewhere"]), (False, [])]):
        ended = call(fit.main, *options, f"--trainer.logger={json.dumps(logger)}")
        assert (ended.code, ended.err) == (0, "")
        folder = tmp_path / "runs" / "reward" / str(number)
        assert {path.name for path in (folder / "logs").iterdir()} == {"metrics.csv", "hparams.yaml"}
        assert "train/loss" in (folder / "logs" / "metrics.csv").read_text().splitlines()[0]
        assert len(re.findall(r'src="data:image/svg', (folder / "report.html").read_text())) == 4
        assert {path.name for path in tmp_path.iterdir()} - {"runs"} == set(others or ["elsewhere"])


@pytest.mark.parametrize(
    ("logger", "package"),
    [("CometLogger", "comet-ml"), (f"{BY_CLASS}.CometLogger", "comet-ml")],
)
def test_a_logger_whose_library_is_missing_says_what_to_install(
    logger: str, package: str, call: Callable, tmp_path: Path
) -> None:
    for given in (logger, json.dumps([{"class_path": logger}])):
        ended = call(fit.main, f"--trainer.logger={given}")
        assert ended.code == 2
        what, hint = ended.err.splitlines()
        assert logger in what
        assert hint == f"  help: Install it: pip install {package}"
        assert not list(tmp_path.rglob("0"))


def test_a_failed_start_leaves_no_process_that_could_remove_the_next_runs_folder(
    call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards: list[EmptyFolderGuard] = []

    def kept(folders: list[Path]) -> EmptyFolderGuard:
        guards.append(EmptyFolderGuard(folders))
        return guards[-1]

    monkeypatch.setattr(cli, "EmptyFolderGuard", kept)
    assert call(fit.main, "--trainer.logger=CometLogger").code == 2
    assert [guard._waiting.poll() for guard in guards] == [0]


def test_an_error_of_a_class_about_its_options_is_one_line(call: Callable) -> None:
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "x", "mode": "up"}}
    for given in (stopping, [stopping]):
        ended = call(fit.main, f"--trainer.callbacks={json.dumps(given)}")
        what, _ = ended.err.splitlines()
        assert ended.code == 2
        assert what.startswith("error: trainer: ")
        assert what.endswith(" `mode` can be min, max, got up")


def test_no_library_warns_of_what_a_user_cannot_change(call: Callable, finished_run: FinishedRun) -> None:
    """The default run, tests and resumes are looked at elsewhere; these options each had a library warn."""
    options = [*SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=1"]
    ended = call(fit.main, *options, "--model.gradient_checkpointing=true", "--trainer.precision=bf16-mixed")
    assert (ended.code, ended.err) == (0, "")
