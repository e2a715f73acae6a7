"""What several GPUs have to show, in figures and pass or fail; `benchmarks/gpu_check.py --devices 8` runs it.

The losses of one device and of all are compared, step by step; time and memory are measured with as many rows for each
device; a rank is killed in the middle of a run, which has to end, and to go on from its last checkpoint on half of the
devices to the figures of a run that nobody disturbed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_recipe import SMALL

HERE = Path(__file__).resolve().parent
STEPS = 10
ROWS = 32  # of a step and device
PATIENCE = 300.0  # seconds for a run to save its first checkpoint, or to end after a rank was killed
Figures = dict[str, Any]


def losses(devices: int, root: str, small: bool) -> Figures:
    """The same steps on one device and on all."""
    one, every = (_recipe(number, root, small) for number in (1, devices))
    largest = max(abs(a - b) / abs(a) for a, b in zip(one["losses"], every["losses"], strict=True))
    return {
        "steps": len(one["losses"]),
        "loss_difference": largest,
        "losses_agree": largest < (1e-4 if small else 2e-2),  # float32; bfloat16
        "seconds_per_step_on_1": one["seconds_per_step"],
        "seconds_per_step_on_all": every["seconds_per_step"],
        "peak_memory_gib_on_1": one["peak_memory_gib"],
        "peak_memory_gib_on_all": every["peak_memory_gib"],
    }


def efficiency(devices: int, root: str, small: bool) -> Figures:
    """As many rows for each device: the share of one device's rows a second that each of all still makes."""
    one = _recipe(1, root, small)
    every = _recipe(devices, root, small, {"batch_size": ROWS * devices})
    share = every["rows_per_step"] / every["seconds_per_step"] / devices
    return {
        "rows_per_second_on_1": one["rows_per_step"] / one["seconds_per_step"],
        "rows_per_second_on_all": share * devices,
        "efficiency": share / (one["rows_per_step"] / one["seconds_per_step"]),
        "peak_memory_gib_on_all": every["peak_memory_gib"],
    }


def killed(devices: int, root: str, small: bool) -> Figures:
    """A rank dies; the job ends, and goes on on half of the devices, as if nothing had been."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        options = [f"--model.scratch={json.dumps(SMALL)}", f"--data.root={Path(root).resolve()}", "--data.cache=false"]
        options += ["--data.batch_size=8", "--trainer.max_steps=60", "--run.checkpoint_every_n_steps=5"]
        sharded = ["--trainer.strategy=fully_sharded", f"--trainer.devices={devices}", *_accelerator()]
        begun = subprocess.Popen(
            [*_torchrun(devices), "-m", "proactive.fit", *options, *sharded, "--run.name=killed", "--quiet"],
            cwd=folder,
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        last = Path("runs/killed/0/checkpoints/last.ckpt")
        try:
            _until(lambda: (folder / last).exists() or begun.poll() is not None, "no checkpoint was saved")
            if begun.poll() is not None:
                raise RuntimeError(f"the run ended by itself, with exit code {begun.returncode}")
            os.kill(_ranks(begun.pid)[-1], signal.SIGKILL)
            since = time.perf_counter()
            code = begun.wait(timeout=PATIENCE)
        finally:
            if begun.poll() is None:
                os.killpg(begun.pid, signal.SIGKILL)
        ended_after = time.perf_counter() - since
        half = max(devices // 2, 1)
        resume = [f"--ckpt_path={last}", f"--trainer.devices={half}", "--quiet"]
        _run([*_torchrun(half), "-m", "proactive.fit", *resume], folder)
        _run([sys.executable, "-m", "proactive.fit", *options, *_accelerator(), "--run.name=whole", "--quiet"], folder)
        resumed, whole = (_figures(folder / "runs" / name / "0") for name in ("killed", "whole"))
        difference = max(abs(resumed[name] - whole[name]) for name in ("accuracy", "auroc"))
    return {
        "exit_code_after_the_kill": code,
        "ended_after_seconds": ended_after,
        "resumed_on": half,
        "figures_differ_by": difference,
        "goes_on_as_if_nothing_had_been": code != 0 and difference < 0.05,
    }


def _recipe(devices: int, root: str, small: bool, more: dict[str, Any] | None = None) -> Figures:
    """What benchmarks/gpu_recipe.py measures by FSDP2 on some devices."""
    options = ["--root", root, "--how", "fsdp2", "--steps", str(2 if small else STEPS), "--small", str(small).lower()]
    options += ["--profiled", "false", "--devices", str(devices), "--more", json.dumps(more or {})]
    ended = _run([*_torchrun(devices), str(HERE / "gpu_recipe.py"), *options], None)
    return json.loads(next(line for line in reversed(ended.splitlines()) if line.startswith("{")))


def _torchrun(devices: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]


def _run(command: list[str], folder: Path | None) -> str:
    ended = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _accelerator() -> list[str]:
    return [] if torch.cuda.is_available() else ["--trainer.accelerator=cpu"]


def _ranks(launcher: int) -> list[int]:
    """The processes that torchrun has started, by Linux's account."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def _until(holds: Any, problem: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(problem)
        time.sleep(0.2)


def _figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]["raw"]
