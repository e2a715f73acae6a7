"""How the commands speak: mistakes in two lines, plain text where no terminal is, a bar where one is."""

import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.learning.training import BackboneModule
from proactive import evaluate, fit, inspect
from proactive.terminal import MISTAKE, quiet_imports
from tests.helpers import ROOT, SMALL_BACKBONE, SMALL_RUN, command, python_m, small_root
from tests.patience import HANG
from tests.proactive.conftest import Ended, FinishedRun

PROCESS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
TWO_LINES = re.compile(r"\Aerror: \S.*\n  help: \S.*\n\Z")


def scratch(**changes: object) -> str:
    return f"--model.scratch={json.dumps(SMALL_BACKBONE | changes)}"


# What is given after a working small run, and what the first line of the message must name.
FIT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "root that is not there": (["--data.root=nowhere"], "nowhere"),
    "root without rows": (["--data.root=empty"], "empty"),
    "rows that are no rows": (["--data.root=bad_rows"], "line 1"),
    "unknown option": (["--data.rooot=x"], "--data.rooot"),
    "word that is no option": (["train"], "train"),
    "wrong type": (["--data.batch_size=many"], "data.batch_size"),
    "no choice": (["--data.split=random"], "data.split"),
    "unknown optimizer": (["--model.optimizer=sgd"], "model.optimizer"),
    "negative learning rate": (["--model.learning_rate=-1"], "learning_rate"),
    "unknown category": (['--model.category_weights={"right": 2.0}'], "category_weights"),
    "value left out": (["--ckpt_path"], "--ckpt_path"),
    "backbone folder that is not there": (["--model.backbone=/nowhere/model"], "/nowhere/model"),
    "backbone folder without a model": (["--model.backbone=empty"], "empty"),
    "unknown model type": ([scratch(model_type="nosuch")], "nosuch"),
    "no model type": (['--model.scratch={"hidden_size": 32}'], "model_type"),
    "sizes that do not fit": ([scratch(hidden_size=30, num_attention_heads=4)], "30"),
    "unknown attention": (["--model.attn_implementation=nosuch"], "nosuch"),
    "configuration that is not there": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "configuration that is no YAML": (["--config=bad.yaml"], "bad.yaml"),
    "configuration that is a list": (["--config=list.yaml"], "list.yaml"),
    "configuration with an unknown option": (["--config=unknown.yaml"], "rooot"),
    "no such fold": (["--data.fold=3"], "data.fold"),
    "more folds than scenes": (["--data.folds=99"], "data.folds"),
    "fraction above one": (["--data.split=published", "--data.validation_fraction=7"], "validation_fraction"),
    "scenes do not divide a step": (["--data.scenes_per_step=3"], "data.scenes_per_step"),
    "a step of fewer rows than scenes": (["--data.batch_size=2"], "data.scenes_per_step"),
    "a step of no scenes": (["--data.scenes_per_step=0"], "data.scenes_per_step"),
    "negative weight decay": (["--model.weight_decay=-1"], "weight_decay"),
    "negative dropout": (["--model.dropout=-0.1"], "dropout"),
    "dropout of more than all": (["--model.dropout=1.5"], "dropout"),
    "no room for a gradient": (["--model.gradient_clip_norm=0"], "gradient_clip_norm"),
    "negative weight of a category": (['--model.category_weights={"missed_need": -1}'], "missed_need"),
    "no end": (["--trainer.max_epochs=-1"], "without an end"),
    "more tokens than positions": ([scratch(max_position_embeddings=512)], "positions for 512"),
    "trees for an encoder": (
        [scratch(model_type="bert", max_position_embeddings=2048), "--data.layout=tree"],
        "data.layout",
    ),
    "trees of another attention": (
        ["--data.layout=tree", "--model.attn_implementation=flash_attention_2"],
        "FlashAttention2",
    ),
    "trees longer than a window": ([scratch(model_type="mistral", sliding_window=64), "--data.layout=tree"], "64"),
    "trees that are read elsewhere": (["--data.layout=tree", "--model.pooling=mean"], "data.layout"),
    "an encoder as an agent": (["--task=agent", scratch(model_type="bert", max_position_embeddings=2048)], "agent"),
    "an adapter on no layer": (["--model.adapter.targets=[nosuch]"], "model.adapter.targets"),
    "no answers to monitor": (
        ["--task=agent", "--model.sampled_answers=0", "--run.monitor=validation/json_validity"],
        "run.monitor",
    ),
    "negative number of answers": (["--task=agent", "--model.sampled_answers=-1"], "sampled_answers"),
    "an optimizer that cuts what sharding cuts": (
        ["--model.optimizer=paged_adamw_8bit", "--trainer.strategy=fully_sharded", "--trainer.devices=1"],
        "model.optimizer",
    ),
    "a quantized backbone without an adapter": (["--model.quantization=nf4"], "model.quantization"),
    "less than a row at once": (["--data.token_budget=10"], "data.token_budget"),
    "micro-batch of none": (["--data.micro_batch_size=0"], "data.micro_batch_size"),
    "another accumulation": (["--trainer.accumulate_grad_batches=3"], "accumulate_grad_batches"),
    "too short": (["--data.max_length=8"], "data.max_length"),
    "vocabulary too small": (["--data.vocabulary_size=10"], "data.vocabulary_size"),
    "negative workers": (["--data.num_workers=-1"], "num_workers"),
    "unknown figure to monitor": (["--run.monitor=validation/nothing"], "validation/nothing"),
    "saves every 0 steps": (["--run.checkpoint_every_n_steps=0"], "checkpoint_every_n_steps"),
    "runs under a file": (["--run.root=a_file"], "a_file"),
    "checkpoint that is not there": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "checkpoint that is a folder": (["--ckpt_path=empty"], "empty"),
    "checkpoint that is none": (["--ckpt_path=list.yaml"], "list.yaml"),
    "last without a run": (["--ckpt_path=last"], "runs/reward"),
    "prompt that is not there": (["--data.prompt=nowhere.yaml"], "nowhere.yaml"),
    "prompt that is no YAML": (["--data.prompt=bad.yaml"], "bad.yaml"),
    "prompt without its parts": (["--data.prompt=list.yaml"], "list.yaml"),
    "unknown strategy": (["--trainer.strategy=nosuch"], "nosuch"),
    "unknown accelerator": (["--trainer.accelerator=nosuch"], "nosuch"),
    "unknown callback": (['--trainer.callbacks=[{"class_path": "no.such.Thing"}]'], "no.such.Thing"),
}
EVALUATE_MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing to do": ([], "reward"),
    "unknown model": (["agent"], "agent"),
    "no checkpoint given": (["reward"], "checkpoint"),
    "checkpoint that is not there": (["reward", "--checkpoint=nowhere"], "nowhere"),
    "folder that is no run": (["reward", "--checkpoint=empty"], "empty"),
    "file that is no checkpoint": (["reward", "--checkpoint=list.yaml"], "list.yaml"),
    "unknown option": (["reward", "--checkpoint=RUN", "--fold=1"], "--fold"),
    "wrong type": (["reward", "--checkpoint=RUN", "--data.fold=one"], "fold"),
    "root that is not there": (["reward", "--checkpoint=RUN", "--data.root=nowhere"], "nowhere"),
    "no such fold": (["reward", "--checkpoint=RUN", "--data.fold=7"], "data.fold"),
    "prompt that is not there": (["reward", "--checkpoint=RUN", "--data.prompt=nowhere.yaml"], "nowhere.yaml"),
    "micro-batch of none": (["reward", "--checkpoint=RUN", "--micro_batch_size=0"], "micro_batch_size"),
    "export without weights": (["reward", "--checkpoint=no_weights"], "no_weights"),
    "export with half its weights": (["reward", "--checkpoint=half_weights"], "half_weights"),
    "output that is a folder": (["reward", "--checkpoint=RUN", "--quiet", "--output=empty"], "empty"),
    "output under a file": (["reward", "--checkpoint=RUN", "--quiet", "--output=a_file/m.json"], "a_file"),
}
INSPECT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "root that is not there": (["--root=nowhere"], "nowhere"),
    "unknown option": (["--data.root=embedded"], "--data.root"),
    "wrong type": (["--folds=five"], "folds"),
    "too few folds": (["--folds=1"], "folds"),
    "no folds": (["--folds=0"], "folds"),
    "tokenizer that is not there": (["--tokenizer=/nowhere"], "/nowhere"),
}


@pytest.fixture
def mistaken_files(tmp_path: Path) -> Path:
    """What the mistakes are made with."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad_rows" / "reward_data").mkdir(parents=True)
    (tmp_path / "bad_rows" / "reward_data" / "train_data.jsonl").write_text("{}\n")
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "bad.yaml").write_text("data: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("data:\n  rooot: x\n")
    return tmp_path


def assert_two_lines(err: str, named: str) -> None:
    assert TWO_LINES.match(err), err
    assert named in err.splitlines()[0]


@pytest.mark.parametrize("mistake", FIT_MISTAKES)
def test_a_mistake_in_fit_takes_two_lines_loads_no_weights_and_leaves_no_run(
    mistake: str,
    call: Callable,
    mistaken_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is found before any weight is made or loaded, which may take minutes."""

    def no_weights(*arguments: object) -> None:
        raise AssertionError("weights are made")

    root = tmp_path_factory.getbasetemp() / "root_for_mistakes"
    if not root.exists():
        small_root(root)
    arguments, named = FIT_MISTAKES[mistake]
    monkeypatch.setattr(BackboneModule, "_build", no_weights)
    before = set(mistaken_files.rglob("*"))
    ended = call(fit.main, *SMALL_RUN, f"--data.root={root}", *arguments)
    assert ended.code == MISTAKE == 2
    assert_two_lines(ended.err, named)
    left = {path for path in set(mistaken_files.rglob("*")) - before if path.name not in ("runs", "reward", "agent")}
    assert left == set()  # else the next --ckpt_path last would take it for the newest run


@pytest.mark.parametrize("mistake", EVALUATE_MISTAKES)
def test_a_mistake_in_evaluate_takes_two_lines(
    mistake: str, call: Callable, mistaken_files: Path, finished_run: FinishedRun
) -> None:
    arguments, named = EVALUATE_MISTAKES[mistake]
    if named.endswith("_weights"):
        broken = mistaken_files / named
        broken.mkdir()
        for path in (finished_run.folder / "export").iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        weights = broken / "model.safetensors"
        half = weights.read_bytes()[: weights.stat().st_size // 2]
        weights.unlink()
        if named == "half_weights":
            weights.write_bytes(half)
    before = set(mistaken_files.rglob("*"))
    ended = call(evaluate.main, *(argument.replace("RUN", str(finished_run.folder)) for argument in arguments))
    assert ended.code == MISTAKE
    assert_two_lines(ended.err, named)
    assert set(mistaken_files.rglob("*")) == before


@pytest.mark.parametrize("mistake", INSPECT_MISTAKES)
def test_a_mistake_in_inspect_takes_two_lines(mistake: str, call: Callable, mistaken_files: Path) -> None:
    arguments, named = INSPECT_MISTAKES[mistake]
    ended = call(inspect.main, *arguments)
    assert (ended.code, ended.out) == (MISTAKE, "")
    assert_two_lines(ended.err, named)


def test_a_start_that_failed_does_not_become_the_last_run(
    call: Callable, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """A mistake after an interrupted run must not hide that run from --ckpt_path last."""
    last = tmp_path / "runs" / "reward" / "0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    (last.parent.parent / "config.yaml").write_bytes((finished_run.folder / "config.yaml").read_bytes())
    last.write_bytes(b"truncated")
    assert call(fit.main, *SMALL_RUN, "--data.root=nowhere").code == MISTAKE
    assert "runs/reward/0/checkpoints/last.ckpt" in call(fit.main, "--ckpt_path=last").err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ended = command("proactive.inspect", "--root", "nowhere", "--debug", cwd=tmp_path)
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr
    assert "nowhere: no such file or folder" in ended.stderr
    assert 'File "' in ended.stderr


def test_a_mistake_in_a_process_ends_with_code_2(tmp_path: Path) -> None:
    """With all that libraries may add to standard error while a command starts and ends."""
    ended = python_m("proactive.fit", *SMALL_RUN, "--data.root=nowhere", cwd=tmp_path)
    assert ended.returncode == MISTAKE
    assert_two_lines(ended.stderr, "nowhere")
    assert "Traceback" not in ended.stdout
    ended = python_m("proactive.fit", "--data.rooot=x", cwd=tmp_path)
    assert ended.returncode == MISTAKE
    assert_two_lines(ended.stderr, "--data.rooot")
    assert ended.stderr.splitlines()[1] == "  help: See python -m proactive.fit --help."


def in_terminal(*arguments: str | Path, cwd: Path) -> tuple[int, str]:
    """Run `python -m` with a pseudo-terminal for input and output; its exit code and all that it showed."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**os.environ, **PROCESS, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(secondary)
    shown, end = b"", time.monotonic() + HANG
    try:
        while time.monotonic() < end:
            if not select.select([primary], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(primary, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        return process.wait(max(end - time.monotonic(), 1)), shown.decode()
    finally:
        process.kill()
        os.close(primary)


def test_a_terminal_shows_bars_and_a_configuration_gives_the_same_run_again(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    """One run for both: config.yaml of the finished run alone, from another working directory, in a terminal."""
    code, shown = in_terminal("proactive.fit", "--config", finished_run.folder / "config.yaml", cwd=tmp_path)
    assert code == 0, shown
    assert "\x1b[" in shown
    assert "━" in shown
    assert re.search(r"Epoch \d/\d.*\d+/6", shown)  # 6 steps
    assert "Testing" in shown
    assert "Traceback" not in shown
    assert shown.rstrip().endswith("runs/reward/0")
    folder = tmp_path / "runs" / "reward" / "0"
    found, expected = (
        json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in (folder, finished_run.folder)
    )
    digests = [record.pop("weights_digest") for record in (found, expected)]  # of files that name their folders
    assert all(digests)
    for record in (found, expected):
        del record["run"]["started"], record["run"]["seconds"]
    assert found == expected
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (folder, finished_run.folder)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluate_in_a_terminal_shows_a_bar(finished_run: FinishedRun, tmp_path: Path) -> None:
    code, shown = in_terminal("proactive.evaluate", "reward", "--checkpoint", finished_run.folder, cwd=tmp_path)
    assert code == 0, shown
    assert "Testing" in shown
    assert "this model, raw" in shown


@pytest.mark.parametrize("what", ["fit", "inspect"])
def test_a_reader_that_goes_away_causes_no_traceback(what: str, finished_run: FinishedRun, tmp_path: Path) -> None:
    """As in `| head -1`, but with the reader gone from the start, so that every line meets a broken pipe."""
    arguments = {"fit": [*SMALL_RUN, f"--data.root={finished_run.root}"], "inspect": ["--root", finished_run.root]}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", f"proactive.{what}", *map(str, arguments[what])],
            cwd=tmp_path,
            env={**os.environ, **PROCESS},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
        )
    finally:
        os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode != 0


def test_a_library_that_sets_up_its_messages_when_it_is_imported_stays_quiet(call: Callable[..., Ended]) -> None:
    def main(arguments: list[str]) -> None:
        with quiet_imports():
            logging.getLogger("lightning").setLevel(logging.INFO)  # as its import does
        print(logging.getLogger("lightning").level)

    assert call(main).out == f"{logging.WARNING}\n"


def test_ctrl_c_while_python_exits_causes_no_traceback() -> None:
    """The handler of a run that has ended would raise within another function that Python calls at its end."""
    code = """
import atexit, os, signal
from proactive.terminal import run

def main(arguments):
    signal.signal(signal.SIGINT, lambda number, frame: 1 / 0)
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    raise SystemExit(5)

run(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
