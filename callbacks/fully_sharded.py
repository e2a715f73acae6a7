"""FullySharded: a strategy that shards weights, gradients and optimizer state, and saves sharded checkpoints."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules.errors import UserError
from datamodules.files.writing import Unfinished, disk_full, put_in_place, sync, write_error
from models.learning import sharded_files as shards
from models.learning.checkpoint_files import checkpoint_problem, load_run, refuse_damaged
from models.learning.checkpoint_paths import VALUES, is_sharded
from models.learning.training import BackboneModule
from models.networks.sharding import fill, zeros_as


class FullySharded(ModelParallelStrategy):
    """PyTorch's FSDP2 over all ranks, with checkpoints that any number of ranks can load.

    Args:
        replicas: Number of copies of the weights, a divisor of the number of ranks. 1 shards them over all ranks. With
            one replica for each node, ranks gather weights within a node, and only gradients cross the network.

    Raises:
        UserError: The number of ranks is not a multiple of `replicas`.
    """

    def __init__(self, replicas: int = 1) -> None:
        super().__init__()
        self.replicas = replicas

    def setup_environment(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._setup_distributed()
        if self.replicas < 1 or self.world_size % self.replicas:
            raise UserError(
                f"trainer.strategy: {self.world_size} ranks cannot hold {self.replicas} replicas of the weights",
                "Give a number of replicas that divides the number of ranks.",
            )
        shape = (self.replicas, self.world_size // self.replicas)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "shards"))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Delay the all-reduce between replicas to the end of the step.

        Within a replica, gradients are reduced to shards after each micro-batch; otherwise every rank would hold full
        gradients.
        """
        self._exchange_between_replicas(False)
        try:
            yield
        finally:
            self._exchange_between_replicas(True)

    def _exchange_between_replicas(self, exchange: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        if self.replicas == 1:
            return
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(exchange, recurse=False)

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return shards.optimizer_state(self.lightning_module, plain)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder next to `filepath`, and rename it after all ranks have written their shards."""
        assert self.lightning_module is not None
        target = Path(self.broadcast(filepath))
        other_names = shards.aliases(self.lightning_module)
        state = {name: value for name, value in checkpoint.pop("state_dict").items() if name not in other_names}
        weights, rest = shards.split_state(state)
        kept: dict[str, Tensor] = {}
        optimizers = []
        for number, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            sharded, small = shards.split_state(optimizer["state"])
            kept |= {f"{number}|{name}": value for name, value in sharded.items()}
            optimizers.append({**optimizer, "state": small})
        values = {**checkpoint, "state_dict": rest, "optimizer_states": optimizers, "aliases": other_names}
        with contextlib.ExitStack() as stack:  # rank 0 removes an unfinished folder
            begin = lambda: stack.enter_context(Unfinished(target, folder=True)).path  # noqa: E731
            folder = self._on_rank_0(target, begin)
            for tensors, name in ((weights, shards.WEIGHTS), (kept, shards.OPTIMIZER)):
                if tensors:
                    self._write(tensors, folder / name, target)
            files = self._checksums(folder)
            self._on_rank_0(target, lambda: _finish(folder, {**values, "files": files}, target))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's part of a checkpoint, which any number of ranks, or one device, wrote."""
        path = Path(self.broadcast(checkpoint_path))
        problem = self.broadcast(checkpoint_problem(path) if self.global_rank == 0 else None)
        refuse_damaged(path, problem)
        assert self.lightning_module is not None
        assert isinstance(self.lightning_module, BackboneModule)
        sharded = is_sharded(path)
        values = load_run(path, type(self.lightning_module), checked=True, whole=False)
        self._load_weights(values.pop("state_dict"), path / shards.WEIGHTS if sharded else None, values)
        optimizers = values.pop("optimizer_states", [])
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            for number, (optimizer, state) in enumerate(zip(self.optimizers, optimizers, strict=True)):
                self._load_optimizer(number, optimizer, state, path / shards.OPTIMIZER if sharded else None)
        return values

    def _load_weights(self, saved: dict[str, Any], folder: Path | None, values: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        other_names = values.get("aliases", {})
        shapes = {name: value.shape for name, value in saved.items()}
        if folder is not None:
            shapes |= {name: size for name, (size, _) in shards.tensor_layouts(folder).items()}
            shapes |= {name: shapes[first] for name, first in other_names.items() if first in shapes}
        if {name: value.shape for name, value in own.items()} != shapes:
            raise UserError(
                "the model or its tokenizer differs in size from the one in the checkpoint",
                "Resume with the same model options and data.vocabulary_size, or start a new run.",
            )
        for name, value in saved.items():
            fill(own[name], value)
        if folder is not None:
            shards.read_shards(folder, {n: v for n, v in own.items() if n not in saved and n not in other_names})

    def _load_optimizer(
        self, number: int, optimizer: torch.optim.Optimizer, state: dict[str, Any], folder: Path | None
    ) -> None:
        assert self.lightning_module is not None
        own = {f"{number}|{name}": weight for name, weight in self.lightning_module.named_parameters()}
        if folder is None:
            state = _shards_of(state, [p for group in optimizer.param_groups for p in group["params"]])
        else:
            sharded = {
                name: zeros_as(own[name.rpartition("|")[0]], size, dtype)
                for name, (size, dtype) in shards.tensor_layouts(folder).items()
                if name.startswith(f"{number}|")
            }
            shards.read_shards(folder, sharded)
            found = {name.partition("|")[2]: value for name, value in sharded.items()}
            state = shards.by_index({**state, "state": {**state["state"], **found}})
        optimizer.load_state_dict(state)

    def _write(self, tensors: dict[str, Tensor], folder: Path, target: Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            shards.write_shards(tensors, folder)
        except CheckpointException as error:  # all ranks raise it, whichever rank failed
            failures: Mapping[int, Any] = error.failures
            rank, (cause, _) = next(iter(failures.items()))
            if not isinstance(cause, OSError):
                raise
            raise write_error(target, f"{cause.strerror or cause} (rank {rank})") from error

    def _checksums(self, folder: Path) -> dict[str, int]:
        """The checksums of all files. Each rank reads the files that it wrote."""
        mark = f"shard-{self.global_rank + 1:05d}-"
        gathered: list[Any] = [None] * self.world_size
        mine = shards.checksums(folder, [path for path in folder.rglob("*") if path.name.startswith(mark)])
        dist.all_gather_object(gathered, mine)
        return {name: value for found in gathered for name, value in found.items()}

    def _on_rank_0(self, target: Path, action: Callable[[], Path]) -> Path:
        """Run `action` on rank 0. All ranks wait, return its path, and raise the same error if it fails."""
        problem, path = None, target
        if self.global_rank == 0:
            try:
                path = action()
            except UserError as error:
                problem = error.what, error.hint
            except (OSError, RuntimeError) as error:
                if not (reason := disk_full(error) or getattr(error, "strerror", None)):
                    raise
                problem = str(reason), ""
        problem, path = self.broadcast((problem, path))
        if problem:
            raise UserError(*problem) if problem[1] else write_error(target, problem[0])
        return path


StrategyRegistry.register("fully_sharded", FullySharded, description="PyTorch's FSDP2 over all ranks")


def _finish(folder: Path, values: dict[str, Any], target: Path) -> Path:
    with (folder / VALUES).open("wb") as file:
        torch.save(values, file)
        sync(file)
    shards.sync(folder)
    put_in_place(folder, target)
    return target


def _shards_of(state: dict[str, Any], weights: list[Tensor]) -> dict[str, Any]:
    """This rank's shards of the optimizer state of one device."""
    by_number: dict[int, dict[str, Any]] = {}
    for number, kept in state["state"].items():
        by_number[number] = {}
        for key, value in kept.items():
            by_number[number][key] = value
            if value.ndim:
                by_number[number][key] = zeros_as(weights[number], value.shape, value.dtype)
                fill(by_number[number][key], value)
    return {**state, "state": by_number}
