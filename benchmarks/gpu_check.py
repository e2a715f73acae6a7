"""Checks this project on a GPU, in one command of under 8 minutes: correctness, speed and memory.

    python benchmarks/gpu_check.py --root DIR                          one GPU; needs the extra adapters
    python benchmarks/gpu_check.py --root DIR --only '[full, qlora]'   some parts of it
    python benchmarks/gpu_check.py --root DIR --devices 8              the checks for several GPUs, in 10 minutes

Each part runs in its own process with its own time limit. If one fails, the others still run. Figures are written to
gpu_check.json after each part, and shown in a table at the end, next to their targets. The exit code is 1 if a part
failed. A missed target is shown, but does not change the exit code. `--small true` runs everything on a CPU.
"""

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import several_gpus
import torch
import yaml
from gpu_recipe import SHAPE, SMALL, matrix_rate, measure, now
from jsonargparse import auto_cli
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from optimizers import OPTIMIZERS, optimizer_figures
from rich.console import Console
from rich.table import Table

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.files.writing import write_atomically
from models.decoding.branch_checks import branch_problem
from models.judging.weights import best_device
from models.learning.reward_classifier import RewardClassifier

PACKAGES = ("torch", "transformers", "lightning", "triton", "bitsandbytes", "torchao", "flashoptim", "peft")
GIB = 2**30
TAIL = 4000  # characters of a failed part's output that are kept
STEPS = 20  # of a recipe that are timed
SMALL_PATIENCE = 10  # factor on time limits on a CPU
Figures = dict[str, Any]


# What is measured


def card(root: str, small: bool) -> Figures:
    """The device, the versions, and the two rates that bound all else."""
    device = best_device()
    size = 256 if small else 8192
    content = torch.randn(2**18 if small else 2**31, device=device, dtype=torch.bfloat16)
    copy_seconds = _seconds(content.clone, 5)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found: Figures = {"device": "cpu", "python": sys.version.split()[0], "versions": versions}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
    copied = 2 * content.numel() * content.element_size()  # read and written
    return found | {
        "bf16_matrix_rate_tflops": matrix_rate(device, size) / 1e12,
        "copy_rate_gb_per_second": copied / copy_seconds / 1e9,
    }


def trees(root: str, small: bool) -> Figures:
    """Whether trees are taken by default, and give the loss and the gradients of rows, in float32."""
    shape = SMALL | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    found: Figures = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for layout in ("auto", "rows"):
        seed_everything(0, verbose=False)
        data = RewardDataModule(root=root, split="published", layout=layout, max_length=1024, cache=False)
        model = RewardClassifier(scratch=shape, dropout=0.0)
        keep = _KeepGradients()
        options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {"enable_model_summary": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        accelerator = "auto" if torch.cuda.is_available() else "cpu"
        trainer = Trainer(max_steps=1, devices=1, accelerator=accelerator, callbacks=[keep], **options)
        trainer.fit(model, data)
        assert model.network is not None
        found[f"{layout}_is"] = data.layout
        found[f"{layout}_attention"] = model.network.config._attn_implementation
        found[f"{layout}_loss"] = float(trainer.callback_metrics["train/loss"])
        gradients[layout] = keep.gradients
    found["loss_difference"] = abs(found["auto_loss"] - found["rows_loss"])
    found["gradient_difference"] = max(
        float((gradients["auto"][name] - one).norm() / one.norm()) for name, one in gradients["rows"].items()
    )
    _check(found["auto_is"] == "tree", f"layout auto took {found['auto_is']}")
    _check(found["loss_difference"] < 1e-4, f"the losses of tree and rows differ by {found['loss_difference']:.1e}")
    _check(found["gradient_difference"] < 1e-2, f"gradients differ by {found['gradient_difference']:.1e}")
    return found


class _KeepGradients(Callback):
    """Keeps the gradients of the last step, as they are before they are clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


def recipe(how: Any, root: str, small: bool) -> Figures:
    """A part of the recipe, as benchmarks/gpu_recipe.py measures it."""
    found = measure(root, how, steps=2 if small else STEPS, small=small)
    found["planned_over_measured"] = found["planned_memory_gib"] / found["peak_memory_gib"]
    _check(all(torch.isfinite(torch.tensor(found["losses"]))), "a loss is not finite")
    return found


def optimizers(root: str, small: bool) -> Figures:
    """Optimizers for bfloat16 weights, as benchmarks/optimizers.py measures them."""
    found = optimizer_figures(small)
    _check(any("learned" in one for one in found.values()), f"no optimizer runs: {found}")
    return found


def generation(root: str, small: bool) -> Figures:
    """Answers by branches of a cache, beside `generate` of transformers; the same tokens in float32."""
    import generation as benchmark

    device = str(best_device())
    shape = yaml.safe_load(SHAPE.read_text())["model"]["scratch"]
    check = benchmark.Setting(root, traces=2, events=4, backbone=SMALL, device=device)
    found: Figures = {}
    answers = [answer.token_ids for answer in benchmark.ours(check, 16, 2, branched=True)]
    found["same_tokens"] = answers == benchmark.plain(check, 16)
    del check
    setting = benchmark.Setting(
        root,
        traces=2 if small else 12,
        events=3 if small else 1000,
        backbone=SMALL if small else shape,
        device=device,
        dtype="float32" if small else "bfloat16",
    )
    found["branch_problem"] = branch_problem(setting.network, 2000)
    new = 8 if small else 64
    branches = partial(benchmark.ours, setting, new, branched=True)  # to try it is timed by no one
    ways: dict[str, Callable[[], Any]] = {
        "all traces side by side": lambda: [a.token_ids for a in branches(12)],
        "4 traces side by side": lambda: [a.token_ids for a in branches(4, first=4)],
        "4 traces, held to JSON": lambda: [a.token_ids for a in branches(4, setting.grammar(), 4)],
        "generate, one padded batch of 4 traces": lambda: benchmark.plain(setting, new, "all", first=4),
        "generate, each event": lambda: benchmark.plain(setting, new, "one", first=1, events=4),
    }
    benchmark.plain(setting, 2, "one", first=1, events=1)  # imports what it needs when first called
    for name, answer in ways.items():
        if best_device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = now()
        try:
            answers = answer()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            continue
        seconds = now() - begin
        tokens = sum(map(len, answers))
        found[name] = {
            "answers": len(answers),
            "new_tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
        }
        print(json.dumps(found), flush=True)
    _check(found["same_tokens"], "branches and generate give other tokens in float32")
    return found


# How it is run


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        measure: Gives the figures of a data root, small or not; raises if something is wrong.
        limit: Seconds after which it is ended.
        shown: The figures of the table; a name with a dot goes one level down.
        targets: For some figures, the least and the greatest value wanted.
    """

    measure: Callable[[str, bool], Figures]
    limit: float
    shown: tuple[str, ...]
    targets: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)


RECIPE = ("seconds_per_step", "utilization", "peak_memory_gib", "planned_over_measured", "first_step_seconds")
PLANNED = {"planned_over_measured": (0.9, 1.1)}
PARTS = {
    "card": Part(card, 40, ("device", "bf16_matrix_rate_tflops", "copy_rate_gb_per_second")),
    "trees": Part(trees, 60, ("auto_is", "auto_attention", "loss_difference", "gradient_difference")),
    "full": Part(
        partial(recipe, "full"),
        90,
        ("recipe_seconds", *RECIPE),
        {"recipe_seconds": (None, 50), "utilization": (0.6, None), "peak_memory_gib": (None, 75)}
        | PLANNED
        | {"first_step_seconds": (None, 30)},
    ),
    "qlora": Part(
        partial(recipe, "qlora"),
        75,
        RECIPE,
        {"seconds_per_step": (None, 0.2), "peak_memory_gib": (None, 24)} | PLANNED,
    ),
    "fsdp2": Part(partial(recipe, "fsdp2"), 75, RECIPE, PLANNED),
    "optimizers": Part(
        optimizers,
        60,
        tuple(f"{n}.{f}" for n in OPTIMIZERS for f in ("milliseconds", "processor_milliseconds", "error")),
    ),
    "generation": Part(
        generation,
        80,
        (
            "same_tokens",
            "branch_problem",
            "all traces side by side.tokens_per_second",
            "4 traces side by side.tokens_per_second",
            "4 traces, held to JSON.tokens_per_second",
            "generate, one padded batch of 4 traces.tokens_per_second",
            "generate, each event.tokens_per_second",
        ),
    ),
}


def parts(devices: int) -> dict[str, Part]:
    """Those of one device, or of several: what these find has to be right, and the figures to be read."""
    if devices == 1:
        return PARTS
    several = {
        "losses": (several_gpus.losses, 200, "losses_agree", ("loss_difference",)),
        "efficiency": (several_gpus.efficiency, 200, None, ("efficiency", "rows_per_second_on_all")),
        "killed": (several_gpus.killed, 200, "goes_on_as_if_nothing_had_been", ("ended_after_seconds", "resumed_on")),
    }

    def checked(measure: Callable[..., Figures], right: str | None) -> Callable[[str, bool], Figures]:
        def check(root: str, small: bool) -> Figures:
            found = measure(devices, root, small)
            print(json.dumps(found), flush=True)
            _check(right is None or found[right], f"{right} does not hold: {found}")
            return found

        return check

    memory = ("peak_memory_gib_on_1", "peak_memory_gib_on_all")
    return {
        name: Part(checked(measure, right), limit, (*shown, *((right,) if right else ()), *memory))
        for name, (measure, limit, right, shown) in several.items()
    }


class WrongError(Exception):
    """What was measured is not as it has to be."""


def main(
    root: str,
    output: Path = Path("gpu_check.json"),
    only: list[str] | None = None,
    small: bool = False,
    devices: int = 1,
    part: str | None = None,
) -> None:
    """Run the parts, one process each, and show what they found.

    Args:
        root: A directory in the published layout.
        output: The JSON file of all figures.
        only: The parts to run; all if null.
        small: Small enough for a CPU; the figures then mean nothing.
        devices: Of this machine; above 1, what several have to show.
        part: Run this one in this process and print its figures: how each process is started.
    """
    known = parts(devices)
    if part is not None:
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        sys.stdin.readline()  # until the part before it has ended
        print(json.dumps(known[part].measure(root, small)))
        return
    if unknown := set(only or ()) - set(known):
        sys.exit(
            f"error: --only: there is no part {', '.join(sorted(unknown))}\n  help: Give some of {', '.join(known)}."
        )
    console = Console(stderr=True)
    names, options = only or list(known), ["--root", str(Path(root).resolve()), "--small", str(small).lower()]
    found: dict[str, Figures] = {}
    started: list[Process] = []
    try:
        for place, name in enumerate(names):
            for soon in names[len(started) : place + 2]:  # this one and the next
                started.append(
                    Process(
                        [sys.executable, "-W", "ignore", __file__, *options, "--devices", str(devices), "--part", soon]
                    )
                )
            found[name] = started[place].finish(known[name].limit * (SMALL_PATIENCE if small else 1))
            console.print(f"{name}: {found[name]['state']} after {found[name]['seconds']:.0f} s")
            write_atomically(output, json.dumps(found, indent=1) + "\n")
    finally:
        for process in started:
            process.end()
    Console(width=140).print(table(found, known, small))
    sys.exit(any(one["state"] != "passed" for one in found.values()))


class Process:
    """A process that prints figures when it is told to go on, and is ended with all that it has started.

    It is started early, so that its imports are done while the part before it is measured.
    """

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the process has ended
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env=_environment(),
        )

    def finish(self, limit: float) -> Figures:
        """Let it go on, for some seconds at most.

        Returns:
            `state` is passed, failed or ended; the last `figures` that it printed; the end of its output as `error`.
        """
        begin = time.perf_counter()
        try:
            printed, in_time = self._process.communicate("go\n", timeout=limit)[0], True
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGUSR1)  # it tells where it is
            time.sleep(1)
            self.end()
            printed, in_time = self._process.communicate()[0], False
        self.end()
        found: Figures = {"seconds": time.perf_counter() - begin}
        self._errors.seek(0)
        told = self._errors.read()[-TAIL:]
        self._errors.close()
        if printed.strip():
            found["figures"] = json.loads(printed.splitlines()[-1])
        if not in_time:
            return {"state": "ended", **found, "error": f"{told}\nit took longer than {limit:.0f} s"}
        if self._process.returncode:
            return {"state": "failed", **found, "error": told}
        return {"state": "passed", **found}

    def end(self) -> None:
        """End it, if it has not, and what it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def table(found: dict[str, Figures], known: dict[str, Part], small: bool) -> Table:
    """What was found, a figure a line, with its target."""
    shown = Table(title="GPU check" + (", small: the figures mean nothing" if small else ""))
    for title in ("part", "state", "figure", "value", "target", ""):
        shown.add_column(title, justify="right" if title == "value" else "left")
    for name, one in found.items():
        if "error" in one:
            shown.add_row(name, one["state"], "", "", "", one["error"].strip().splitlines()[-1][:90])
        for place, figure in enumerate(known[name].shown if "figures" in one else ()):
            value = _value(one["figures"], figure)
            least, most = known[name].targets.get(figure, (None, None))
            target = " to ".join(f"{bound:g}" for bound in (least, most) if bound is not None)
            target = {(True, False): "at least ", (False, True): "at most "}.get(
                (least is not None, most is not None), ""
            ) + target
            is_number = isinstance(value, int | float)
            missed = not is_number or (least is not None and value < least) or (most is not None and value > most)
            reached = "" if small or not target else "missed" if missed else "reached"
            first = (name, one["state"]) if not place and "error" not in one else ("", "")
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown.add_row(*first, figure, text, target, reached)
        shown.add_section()
    return shown


def _value(figures: Figures, name: str) -> Any:
    for key in name.split("."):
        figures = figures.get(key, {}) if isinstance(figures, dict) else {}
    return "" if figures == {} else figures


def _environment() -> dict[str, str]:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, (str(here.parent), str(here), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def _seconds(do: Callable[[], Any], times: int) -> float:
    do()
    best = float("inf")
    for _ in range(times):
        begin = now()
        do()
        best = min(best, now() - begin)
    return best


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
