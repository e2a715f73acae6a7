"""A run that is stopped while its weights are loaded leaves nothing behind."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tests.helpers import SMALL_RUN, start
from tests.patience import HANG
from tests.proactive.conftest import FinishedRun


class SignalWhileLoading(Callback):
    """Sends its own process a signal in the middle of making the network."""

    def __init__(self, number: int) -> None:
        self.number = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        build = pl_module._build

        def stopped() -> None:
            build()
            os.kill(os.getpid(), self.number)
            raise AssertionError("it went on")

        pl_module._build = stopped


@pytest.mark.parametrize(
    ("number", "resumed"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, False)],
)
def test_a_run_stopped_while_loading_leaves_no_folder(
    number: int, resumed: bool, finished_run: FinishedRun, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    stop: dict[str, Any] = {"class_path": f"{__name__}.SignalWhileLoading", "init_args": {"number": int(number)}}
    options = [*SMALL_RUN, f"--data.root={finished_run.root}", f"--trainer.callbacks={json.dumps([stop])}"]
    if resumed:
        options.append(f"--ckpt_path={finished_run.folder / 'checkpoints' / 'last.ckpt'}")
    before = {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        process = start("proactive.fit", *options, cwd=tmp_path)
        said, _ = process.communicate(timeout=HANG)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    assert "Traceback" not in said
    assert ("stopped while loading" in said) == (number != signal.SIGKILL)
    # Of one that was killed, another process removes it a moment later.
    end = time.monotonic() + HANG
    while (left := list(tmp_path.glob("runs/reward/*"))) and time.monotonic() < end:
        time.sleep(0.01)
    assert left == []
    assert not list(temporary.iterdir())
    assert {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")} == before
