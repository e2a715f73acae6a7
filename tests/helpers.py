"""What several tests need: small data in the published layout, small settings, commands as real processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.stopping import StopOnSignal
from datamodules.corpus.conversations import Conversation, open_conversations, read_conversations
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.simulator import simulate
from tests.forking import Forked, run_module
from tests.patience import HANG

ROOT = Path(__file__).parents[1]
PROACTIVEBENCH = ROOT.parent / "shared" / "proactivebench"
needs_proactivebench = pytest.mark.skipif(
    not PROACTIVEBENCH.is_dir(), reason=f"the published files are not at {PROACTIVEBENCH}"
)
SMALL_BACKBONE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
}
SMALL_RUN = [
    f"--model.scratch={json.dumps(SMALL_BACKBONE)}",
    "--data.vocabulary_size=400",
    "--data.folds=3",
    "--data.batch_size=8",
    "--data.micro_batch_size=2",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--run.checkpoint_every_n_steps=3",
]


def write_jsonl(path: Path, rows: Iterable[AnnotatedRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row.published()) + "\n" for row in rows), encoding="utf-8")


def conversations_of(path: Path, counts: Counter[str] | None = None) -> Iterator[Conversation]:
    """The conversations of a file."""
    return read_conversations(open_conversations(str(path)), counts)


def small_root(folder: Path, scenes: int = 9, rows_per_scene: int = 9) -> Path:
    """A data root with a few rows of a few simulated scenes."""
    train, test, _ = simulate(seed=22)
    by_scene: dict[str, list[AnnotatedRow]] = {}
    for row in train:
        by_scene.setdefault(row.scene, []).append(row)
    chosen = [row for rows in list(by_scene.values())[:scenes] for row in rows[:: len(rows) // rows_per_scene]]
    write_jsonl(folder / "reward_data" / "train_data.jsonl", chosen)
    write_jsonl(folder / "reward_data" / "test_data.jsonl", test[:20])
    return folder


@contextmanager
def no_more_memory_than(most: int) -> Iterator[None]:
    """Fails if more bytes are allocated at once within the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def command(module: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a module as a command to its end, in a forked process, which need not import the libraries."""
    process = _fork(module, arguments, cwd, PIPE)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode is not None
    return subprocess.CompletedProcess([module, *map(str, arguments)], process.returncode, out, err)


def start(module: str, *arguments: str | Path, cwd: Path) -> Forked:
    """Start a module as a command in a forked process and leave it running; both streams are `stdout`."""
    return _fork(module, arguments, cwd, STDOUT)


def _fork(module: str, arguments: Sequence[str | Path], cwd: Path, stderr: int) -> Forked:
    arguments = list(map(str, arguments))
    return Forked(run_module, module, arguments, cwd=cwd, env=environment_of_commands(), stderr=stderr)


def python_m(module: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` to its end, for what depends on how a process starts and imports."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=environment_of_commands(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def environment_of_commands() -> dict[str, str]:
    """What commands that tests start find in their environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PROACTIVE_", "PYTEST_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200"}


class SignalAtStep(Callback):
    """Sends its own process a signal in the middle of an optimizer step: there are gradients, and no new weights."""

    def __init__(self, step: int, number: int) -> None:
        self.step = step
        self.number = number
        self.seen = 0

    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getpid(), self.number)


class KillAtStep(SignalAtStep):
    """Kills its own process without warning in the middle of an optimizer step."""

    def __init__(self, step: int) -> None:
        super().__init__(step, signal.SIGKILL)


class KeepFirstGradient(Callback):
    """Writes the gradient of the first optimizer step, as all ranks have it and before it is clipped."""

    FILE = "first_gradient.pt"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            gradient = {name: weight.grad for name, weight in pl_module.named_parameters() if weight.grad is not None}
            torch.save(gradient, self.FILE)


class KillRankAtStep(KillAtStep):
    """Kills one rank of a job in that way."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__(step)
        self.rank = rank

    def on_before_optimizer_step(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_rank == self.rank:
            super().on_before_optimizer_step(trainer, *args, **kwargs)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can become longer than that, which fails a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SignalParentAtStep(SignalAtStep):
    """Sends a signal to the process that started this one, in the middle of an optimizer step, and waits for it."""

    def on_before_optimizer_step(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getppid(), self.number)
            stop = next(callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))
            while not stop._signal:  # passed on by the parent; after its kill, this process ends here
                time.sleep(0.01)
