"""Checkpoints that survive a kill, refuse code, and let a run go on bit for bit.

`SafeCheckpointIO` writes beside the old file and renames, and loads weights and plain values only.
`BestCheckpoint` keeps the best weights.
`LastCheckpoint` keeps `last.ckpt` current, also when the process is asked to stop.
`SeedEachStep` makes the randomness of a step a function of its number, so that it needs no state.
"""

import contextlib
import os
import pickle
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks import shards
from callbacks.files import CHECKPOINTS
from datamodules.agent import AgentDataModule
from datamodules.errors import UserError
from datamodules.reading import require_regular_files
from datamodules.records import validate
from datamodules.reward import RewardDataModule
from datamodules.rows import RowsDataModule
from datamodules.writing import Unfinished, remove, sync
from models.backbone import refuse_unfit_tokenizer
from models.contents import CHECKPOINTS as RECORDS
from models.contents import ShardFiles, naming, refuse_options
from models.training import EXPORT_STATE, BackboneModule, export_state

LAST = "last.ckpt"
BEST = "best.ckpt"
PREVIOUS = "previous.ckpt"
DATA: dict[str, type[RowsDataModule]] = {"reward": RewardDataModule, "agent": AgentDataModule}

Model = TypeVar("Model", bound=BackboneModule)


class Interrupted(BaseException):
    """The process was asked to stop, at some step or, if that is None, while it loaded; it has saved what it could."""

    def __init__(self, signal_number: int, step: int | None) -> None:
        super().__init__(signal_number, step)
        self.signal_number = signal_number
        self.step = step


def refuse_damaged(path: Path, problem: str | None) -> None:
    """Raise a UserError that names the newest good checkpoint beside one that has a problem."""
    if not problem:
        return
    others = [p for p in path.parent.glob("*.ckpt") if p != path and checkpoint_problem(p) is None]
    newest = max(others, key=lambda p: p.stat().st_mtime, default=None)
    hint = f"The newest good one is {newest}: give it as --ckpt_path or --checkpoint." if newest else ""
    raise UserError(f"{path}: {problem}", hint or "There is no good checkpoint beside it; start a new run.")


def load_checkpoint(path: Path, *, checked: bool = False, whole: bool = True) -> dict[str, Any]:
    """Load weights and plain values; nothing in the files can run code.

    Args:
        path: A checkpoint file, or the folder that ranks wrote together.
        checked: Whether it is known to be undamaged.
        whole: Whether to join the shards of a folder; without them its other values alone.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it holds more than weights and plain values.
    """
    if not checked:
        refuse_damaged(path, checkpoint_problem(path))
    sharded = shards.is_sharded(path)
    try:
        file = path / shards.VALUES if sharded else path
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except (pickle.UnpicklingError, RecursionError) as error:
        raise UserError(
            f"{path}: refused, for it holds more than weights and plain values and could run code",
            "Use a checkpoint that this project wrote.",
        ) from error
    except Exception as error:  # whatever a foreign or damaged archive makes the reader say
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no checkpoint ({reason})", "Use a checkpoint that this project wrote.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint",
            "Use a checkpoint that this project wrote.",
        )
    return _joined(path, checkpoint) if sharded and whole else checkpoint


def _joined(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as one device writes it, of the shards and the other values that ranks wrote."""
    state = {**values["state_dict"], **shards.read_whole(folder / shards.WEIGHTS)}
    state |= {name: state[first] for name, first in values["aliases"].items() if first in state}
    kept = shards.read_whole(folder / shards.OPTIMIZER)
    optimizers = []
    for number, optimizer in enumerate(values["optimizer_states"]):
        mine = {name.partition("|")[2]: value for name, value in kept.items() if name.startswith(f"{number}|")}
        optimizers.append(shards.numbered({**optimizer, "state": {**optimizer["state"], **mine}}))
    return {**values, "state_dict": state, "optimizer_states": optimizers}


def load_run(path: Path, task: str, **options: bool) -> dict[str, Any]:
    """Load a checkpoint that `python -m proactive.fit --task ...` wrote; for the options see `load_checkpoint`.

    Raises:
        UserError: As `load_checkpoint`, or it is something else, or of another task.
    """
    checkpoint = load_checkpoint(path, **options)
    found = checkpoint.get("task")
    if isinstance(found, str) and found in DATA and found != task:
        raise UserError(f"{path} is of task {found}, not {task}", f"Give a checkpoint of task {task}.")
    validate(checkpoint, RECORDS[task], str(path))
    return checkpoint


def load_trained(kind: type[Model], target: Path, option: str) -> tuple[Model, dict[str, Any], Path]:
    """A trained model, from a run folder (its best weights), a checkpoint, or an export folder.

    Args:
        kind: The model's class.
        target: Where it is.
        option: What the user gave `target` as.

    Returns:
        The model, its data module's state, and the file or folder that the weights came from.

    Raises:
        UserError: There is no such model there.
    """
    data_kind = DATA[kind.task]
    if (shards.settled(target) / EXPORT_STATE).is_file():
        require_regular_files(target, option)
        with naming(target):
            model, state = kind.from_export(target)
    else:
        target = _checkpoint_of(target, option)
        with naming(target):
            checkpoint = load_run(target, kind.task)
            model, state = kind.from_checkpoint(checkpoint), checkpoint[data_kind.__qualname__]
    with naming(target):
        refuse_options(data_kind, state["hyperparameters"], "hyperparameters")
        data = data_kind.from_state(state)
        refuse_unfit_tokenizer(model.network, data.tokenizer)
    return model, state, target


def checkpoint_task(target: Path, option: str) -> str:
    """Which kind of model a run folder, a checkpoint or an export folder holds.

    Raises:
        UserError: As `load_trained`.
    """
    if (shards.settled(target) / EXPORT_STATE).is_file():
        task = export_state(target).get("task")
    else:
        task = load_checkpoint(_checkpoint_of(target, option), whole=False).get("task")
    if not isinstance(task, str) or task not in DATA:
        raise UserError(
            f"{option}: {target} is no checkpoint of a run: it names no task",
            "Give one that python -m proactive.fit wrote.",
        )
    return str(task)


def _checkpoint_of(target: Path, option: str) -> Path:
    """The checkpoint that `target` is, or the best one of the run folder that it is."""
    if (target / CHECKPOINTS).is_dir():
        names = (shards.settled(target / CHECKPOINTS / name) for name in (BEST, LAST))
        target = next((path for path in names if path.exists()), target)
    shards.settled(target)
    if not target.exists() or (target.is_dir() and not shards.is_sharded(target)):
        raise UserError(
            f"{option}: {target} holds no checkpoint" if target.exists() else f"{option}: there is no {target}",
            f"Give a run folder, a checkpoint, or an export folder (with {EXPORT_STATE}).",
        )
    require_regular_files(target, option)
    return target


def checkpoint_problem(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, or None; reads it once and compares its checksums."""
    if shards.is_sharded(path):
        return _file_problem(path / shards.VALUES) or _shards_problem(path)
    return _file_problem(path)


def _shards_problem(folder: Path) -> str | None:
    """The same for the files that values.pt names."""
    try:
        values = torch.load(folder / shards.VALUES, map_location="cpu", weights_only=True, mmap=True)
        expected = validate(values, ShardFiles, shards.VALUES).files
        if unknown := shards.files(folder) - expected.keys():
            return f"holds {min(unknown)}, which it was not written with"
        found = shards.checksums(folder, (folder / name for name in expected))
        damaged = next((name for name, checksum in expected.items() if found[name] != checksum), None)
        return f"damaged in {damaged}" if damaged else None
    except UserError as error:
        return error.what
    except pickle.UnpicklingError:
        return None  # loading it says what is wrong
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).relative_to(folder)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # whatever a foreign archive makes the reader say
        return f"no checkpoint ({' '.join(str(error).split())[:200]})"


def _file_problem(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            odd = [info.filename for info in archive.infolist() if info.is_dir() or info.external_attr]
            damaged = archive.testzip() or next(iter(odd), None)  # PyTorch reads a "folder" as zeros
            return f"damaged in {damaged}" if damaged else None
    except FileNotFoundError:
        return "there is no such checkpoint"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # zipfile raises a dozen kinds on a damaged table of contents
        return f"truncated, damaged or no checkpoint ({' '.join(str(error).split())[:200]})"


class SafeCheckpointIO(TorchCheckpointIO):
    """Atomic saves, loads with weights_only, and errors that say what to do.

    Args:
        task: Which kind of run's checkpoints to load.
    """

    def __init__(self, task: str = "reward") -> None:
        super().__init__()
        self.task = task

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        with Unfinished(target) as unfinished:
            with unfinished.path.open("wb") as file:
                torch.save(checkpoint, file)
                sync(file)
            shards.put_in_place(unfinished.path, target)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_run(Path(path), self.task)


def _refuse_not_finite(module: LightningModule) -> None:
    assert isinstance(module, BackboneModule)
    module.refuse_not_finite()


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few optimizer steps, after each validation, at the end and when asked to stop.

    SIGTERM and SIGINT (Ctrl-C) end the run after the current step with a saved checkpoint; a second one, or one before
    the weights are loaded, ends it at once. Whether a step was good, only the loss of the next one or a validation can
    tell: until then the checkpoint before it is kept as `previous.ckpt`.

    Args:
        folder: Where `last.ckpt` is kept.
        every_n_steps: Optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        self.path = folder / LAST
        self.previous = folder / PREVIOUS
        self.every_n_steps = every_n_steps
        self._saved = 0
        self._loaded = False
        self._signal = 0
        self._hosts: dist.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != self._note:
                self._handlers[number] = signal.signal(number, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            with naming(trainer.ckpt_path or ""):
                _refuse_other_progress(checkpoint["loops"], {"fit_loop": trainer.fit_loop.state_dict()}, "loops")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loaded = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):  # Lightning has put its own in their place since setup
            signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Where figures are logged; Lightning is one short after a checkpoint of a validation within an epoch.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.previous.exists():
            _refuse_not_finite(pl_module)
            self._drop_previous(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end, with its validation, comes next
        asked = self._asked(trainer)
        # After a last step in the middle of an epoch Lightning counts the epoch as done: a resume would leave it out.
        if asked or trainer.global_step == trainer.max_steps or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        self._stop_if(asked, trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)
            self._drop_previous(trainer)
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved < trainer.global_step:  # no validation followed the epoch's last step
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._stop_if_asked(trainer)

    def _save(self, trainer: Trainer) -> None:
        _refuse_not_finite(trainer.lightning_module)  # before anything makes room for it
        if trainer.is_global_zero and self.path.exists() and self._saved < trainer.global_step:
            remove(self.previous)
            with contextlib.suppress(OSError):  # where the file system has no links, the new one is all there is
                shards.link(self.path, self.previous)
        trainer.save_checkpoint(self.path)
        self._saved = trainer.global_step

    def _drop_previous(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            remove(self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal or not self._loaded:
            raise Interrupted(number, self._saved if self._loaded else None)
        self._signal = number

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any rank was sent, or 0: ranks get it at different steps, and have to stop together."""
        if trainer.world_size == 1:
            return self._signal
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        asked = torch.tensor(self._signal)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._hosts)  # between hosts: no GPU is waited for
        return int(asked)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._stop_if(self._asked(trainer), trainer)

    @staticmethod
    def _stop_if(signal_number: int, trainer: Trainer) -> None:
        if signal_number:
            raise Interrupted(signal_number, trainer.global_step)


def _refuse_other_progress(saved: Any, own: Any, where: str) -> None:
    """Refuse what says how far a run has come, if it is not as Lightning keeps it."""
    if isinstance(own, dict) and isinstance(saved, dict):
        for name, value in own.items():
            _refuse_other_progress(saved.get(name), value, f"{where}.{name}")
    elif type(saved) is not type(own) or (isinstance(saved, int) and saved < 0):
        raise UserError(
            f"the checkpoint does not say how far its run had come: field {where} does not serve",
            "Resume from another checkpoint, or start a new run.",
        )


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the best figure in `best.ckpt`, also when the run folder was moved before a resume.

    Args:
        folder: Where `best.ckpt` is kept.
        monitor: The logged figure to judge by; one that ends in loss or error is best when least.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        mode = "min" if monitor.endswith(("loss", "error")) else "max"
        # At validation's end, before `LastCheckpoint` saves: so that a resumed run knows of it.
        options: dict[str, Any] = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        super().__init__(folder, Path(BEST).stem, monitor=monitor, mode=mode, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath), BEST)
        score = state_dict.get("best_model_score")
        known = here.exists() and isinstance(score, torch.Tensor) and score.numel() == 1
        # Only the figure is a checkpoint's to say: Lightning removes what lies under the paths, and it forgets the
        # figure where the folder's path is another.
        super().load_state_dict(
            {
                "dirpath": self.dirpath,
                "best_model_score": score if known else None,
                "best_model_path": str(here) if known else "",
                "kth_best_model_path": str(here) if known else "",
                "kth_value": score if known else self.kth_value,
                "best_k_models": {str(here): score} if known else {},
                "last_model_path": "",
            }
        )


class SeedEachStep(Callback):
    """Seeds dropout and the like before each step from the run's seed, the epoch, the step's place and the rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        seed = 0
        for part in (run_seed, trainer.current_epoch, batch_idx, trainer.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63  # Knuth's MMIX
        torch.manual_seed(seed)
