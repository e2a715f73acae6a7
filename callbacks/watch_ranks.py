"""A rank that dies ends the whole job, which then says which rank it was, and why."""

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

PERIOD = 0.5  # seconds between looks
GRACE = 10.0  # seconds in which rank 0 may come to an error that all ranks have
PATIENCE = 20.0  # seconds that a rank which lost another one waits for the job's end
OTHERS_WATCH = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
FAILED = 1  # the job's exit code


class WatchRanks(Callback):
    """Watches the processes that rank 0 has started on its machine, and from them rank 0.

    Lightning's own observer ends a job too, but silently; and a rank that waits for a dead one may wait for half an
    hour. Where torchrun or SLURM starts the ranks, it is they who watch.

    Args:
        folder: The run's folder, to say how to go on.
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
        """A lost connection is another rank's death, which is what has to be told; any other error is one's own."""
        if not lost_a_rank(exception):
            self._own_end.set()
        elif trainer.world_size > 1 and not any(name in os.environ for name in OTHERS_WATCH):
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:  # rank 0 looks itself, for its thread may be in between
                self._end_if_one_died()
                time.sleep(PERIOD / 5)

    def _watch_children(self) -> None:
        while any(child.poll() is None for child in self._children):
            self._end_if_one_died()
            time.sleep(PERIOD)
        self._end_if_one_died()

    def _end_if_one_died(self) -> None:
        codes = {rank: child.poll() for rank, child in enumerate(self._children, start=1)}
        # One that was killed before one that then failed for want of it.
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
        print(printable(f"  help: Go on from the last checkpoint: {how}"), file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(FAILED)  # other threads wait for a rank that is no more


@contextlib.contextmanager
def following_parent() -> Iterator[None]:
    """As long as this lasts, end this process when rank 0, which has started it, is no more."""
    parent, done = os.getppid(), threading.Event()

    def watch() -> None:
        while not done.wait(PERIOD):
            if os.getppid() != parent:
                rank = os.environ.get("LOCAL_RANK")
                print(
                    f"error: rank 0 (process {parent}) has ended, so rank {rank} ends too", file=sys.stderr, flush=True
                )
                os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def lost_a_rank(exception: BaseException) -> bool:
    """Whether an exception says that another rank does not answer."""
    from torch.distributed import DistError

    text = str(exception)
    return isinstance(exception, DistError) or (isinstance(exception, RuntimeError) and "gloo" in text.lower())


def reason(code: int) -> str:
    """Why a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}; its own message is above"
    name = signal.Signals(-code).name
    memory = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"
