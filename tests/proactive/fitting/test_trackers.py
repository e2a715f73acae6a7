"""Trackers in their offline modes: what arrives there, and what does not."""

import csv
import importlib.util
import json
import sqlite3
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proactive import fit
from proactive.fitting.trackers import MODULES
from tests.helpers import SMALL_RUN
from tests.proactive.conftest import Ended, FinishedRun

SECRET = "0123456789abcdef0123456789abcdef01234567"  # in the form of a key of W&B
BLOCK = 2**15  # bytes of a block of a .wandb file, whose format is that of LevelDB's logs
Curves = dict[str, dict[int, float]]  # the values of each metric, by step


def in_tensorboard(folder: Path) -> tuple[Curves, str]:
    """The metrics that a tracker has, and its hyperparameters as text."""
    events = EventAccumulator(str(folder / "logs")).Reload()
    names = [name for name in events.Tags()["scalars"] if name != "hp_metric"]
    curves = {name: {event.step: event.value for event in events.Scalars(name)} for name in names}
    return curves, "".join(path.read_bytes().decode("latin1") for path in (folder / "logs").glob("events.*"))


def in_wandb(folder: Path) -> tuple[Curves, str]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of the process; it waits until all is written
    (file,) = (folder / "logs").rglob("*.wandb")
    curves: Curves = defaultdict(dict)
    hyperparameters = ""
    for content in wandb_records(file.read_bytes()):
        record = Record.FromString(content)
        logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = logged.get("trainer/global_step")
        for name, value in logged.items():
            if not name.startswith("_") and name not in ("epoch", "trainer/global_step"):
                curves[name][step] = value
        updates = [*record.config.update, *record.run.config.update]
        hyperparameters += "".join(f"{item.key or '/'.join(item.nested_key)}: {item.value_json}\n" for item in updates)
    return curves, hyperparameters


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, each joined from its parts."""
    place, parts = 7, b""  # after the header of the file
    while place < len(content):
        if BLOCK - place % BLOCK < 7:  # no room for the header of a part
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += 7
        parts += content[place : place + length]
        place += length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def in_mlflow(folder: Path) -> tuple[Curves, str]:
    with sqlite3.connect(folder.parents[1] / "mlflow.db") as store:
        curves: Curves = defaultdict(dict)
        for name, step, value in store.execute("select key, step, value from metrics"):
            curves[name][step] = value
        hyperparameters = "\n".join(f"{key}: {value}" for key, value in store.execute("select key, value from params"))
        assert store.execute("select name, status from runs").fetchall() == [("reward/0", "FINISHED")]
    return curves, hyperparameters


TRACKERS = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_all_metrics_and_hyperparameters_and_no_key(
    tracker: str, call: Callable[..., Ended], finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := [name for name in MODULES.get(tracker, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{tracker} needs {', '.join(missing)}: pip install 'proactive[trackers]'")
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    options = [*SMALL_RUN, f"--data.root={finished_run.root}", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    ended = call(fit.main, *options, f"--run.tracker={tracker}")
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "runs" / "reward" / "0"
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    curves, hyperparameters = TRACKERS[tracker](folder)
    for name in lines[0].keys() - {"epoch", "step"}:
        logged = {int(line["step"]): float(line[name]) for line in lines if line[name]}
        assert curves[name] == pytest.approx(logged, rel=1e-5), name
    for name in ("learning_rate", "vocabulary_size", "max_steps", "monitor"):  # of model, data, trainer and run
        assert name in hyperparameters
    for path in (tmp_path / "runs").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
        if path.suffix == ".wandb":  # what an upload sends
            assert not [
                word for word in (b"--run.tracker", b"python3", b"requirements.txt") if word in path.read_bytes()
            ]


@pytest.mark.parametrize("tracker", MODULES)
def test_a_tracker_whose_library_is_missing_names_the_extra(
    tracker: str, call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = MODULES[tracker][-1]
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    ended = call(fit.main, f"--run.tracker={tracker}")
    what, hint = ended.err.splitlines()
    assert what.startswith(f"error: run.tracker: {tracker} needs {module}, which is not installed")
    assert hint == "  help: Install the extra: pip install 'proactive[trackers]'."
    assert not list(tmp_path.iterdir())
