"""Ends the whole job when a rank dies, and prints which rank it was and why."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.escaping import printable

PERIOD = 0.5  # seconds between checks
GRACE = 10.0  # seconds for rank 0 to raise an error that all ranks raise
PATIENCE = 20.0  # seconds that a rank waits for the end of the job after it lost another rank
PARENT_VARIABLE = "PROACTIVE_PARENT"  # the id of the process that runs all folds, in the environment of each
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")  # variables of launchers that watch the ranks themselves
FAILED = 1  # exit code


class WatchRanks(Callback):
    """Watches the processes that rank 0 started on its machine. `following` watches rank 0 from them.

    Lightning's observer ends a job without a message, and a rank may wait half an hour for a dead one. torchrun and
    SLURM watch the ranks that they start.

    Args:
        folder: The run folder, for the message that says how to resume.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._watching = False
        self._own_end = threading.Event()
        self._children: Sequence[subprocess.Popen[Any]] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        launcher = trainer.strategy.launcher
        if self._watching or trainer.world_size == 1 or launcher is None:
            return
        self._watching = True
        self._children = getattr(launcher, "procs", ())
        if self._children:
            threading.Thread(target=self._watch_children, daemon=True).start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After a lost connection, wait until the dead rank is reported. Other errors are this rank's own."""
        if not lost_a_rank(exception):
            self._own_end.set()
        elif trainer.world_size > 1 and not any(name in os.environ for name in LAUNCHERS):
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:  # check here too, because the thread may sleep
                self._end_if_one_died()
                time.sleep(PERIOD / 5)

    def _watch_children(self) -> None:
        while any(child.poll() is None for child in self._children):
            self._end_if_one_died()
            time.sleep(PERIOD)
        self._end_if_one_died()

    def _end_if_one_died(self) -> None:
        codes = {rank: child.poll() for rank, child in enumerate(self._children, start=1)}
        # A negative code comes first: a killed rank is the cause, and ranks that failed later are the effect.
        dead = sorted((code, rank) for rank, code in codes.items() if code)
        if dead:
            code, rank = dead[0]
            if self._own_end.wait(GRACE if code > 0 else 0.0):
                return
            self._end(f"rank {rank} (process {self._children[rank - 1].pid}) {reason(code)}")

    def _end(self, what: str) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
        how = f"python -m proactive.fit --ckpt_path {self.folder / 'checkpoints' / 'last.ckpt'}"
        print(f"error: {what}, so the job has ended", file=sys.stderr)
        print(printable(f"  help: Resume from the last checkpoint: {how}"), file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(FAILED)  # other threads still wait for the dead rank


@contextlib.contextmanager
def following(parent: int, who: str) -> Iterator[None]:
    """Within this context, end this process when its parent has ended.

    Args:
        parent: The id of the parent's process.
        who: What the parent is, for the message.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PERIOD):
            if os.getppid() != parent:
                rank = f"rank {os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "this run"
                print(f"error: {who} (process {parent}) has ended, so {rank} ends too", file=sys.stderr, flush=True)
                os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def lost_a_rank(exception: BaseException) -> bool:
    """Whether an exception means that another rank does not respond."""
    from torch.distributed import DistError

    text = str(exception)
    return isinstance(exception, DistError) or (isinstance(exception, RuntimeError) and "gloo" in text.lower())


def reason(code: int) -> str:
    """A phrase that says why a process ended."""
    if code >= 0:
        return f"ended with exit code {code}; its own message is above"
    name = signal.Signals(-code).name
    memory = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"
