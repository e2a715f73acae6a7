"""Logs training speed, by Lightning's Throughput, and peak memory."""

import resource
import sys
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from datamodules.batching.steps import BatchSize
from models.learning.training import BackboneModule
from models.networks.operations import GIB, Operations, find_device

WINDOW = 10  # steps


class ThroughputLog(Callback):
    """Logs rows and tokens per second, utilization, and peak memory.

    A rate is the mean of the last `window` steps on rank 0, times the number of ranks. It includes the time for data
    loading, and excludes validations. The metrics, each as `throughput/NAME`:

    - rows_per_second.
    - tokens_per_second: computed tokens, padding included.
    - effective_tokens_per_second: tokens of all rows, as the rows layout computes them.
    - utilization: the model's operations per second over the device's peak rate, 0 to 1, if the peak is known.
    - peak_memory_gib: of rank 0's device, or of its process without a GPU.

    Args:
        window: Number of steps in a mean. Nothing is logged before the window is full.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = None
        if trainer.strategy.root_device.type == "cuda" and _computes_in_16_bits(trainer):
            device = find_device(torch.cuda.get_device_name(trainer.strategy.root_device))
            peak = device.peak if device else None
        self._computed = Throughput(peak, window_size=self.window)
        self._effective = Throughput(window_size=self.window)  # Lightning's Throughput counts one kind of tokens
        self._seconds, self._steps, self._done = 0.0, 0, BatchSize()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BackboneModule)
        assert pl_module.network is not None
        self._operations = Operations.of(pl_module.network)
        self._forward = Operations.of(pl_module.network, backward=False)
        self._since = time.perf_counter()  # a run resumed within an epoch does not call on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        step = sum((BatchSize(**micro_batch["size"]) for micro_batch in batch), BatchSize())
        self._done += step
        self._steps += 1
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        totals: dict[str, Any] = {"time": self._seconds, "batches": self._steps, "samples": self._done.rows}
        assert isinstance(pl_module, BackboneModule)
        counts = step.unpadded_tokens, step.pairs, step.targets
        operations = self._operations.count(*counts) + pl_module.extra_forward_passes * self._forward.count(*counts)
        self._computed.update(**totals, lengths=self._done.tokens, flops=operations)
        self._effective.update(**totals, lengths=self._done.effective_tokens)
        if found := self._rates(trainer.world_size):
            found["peak_memory_gib"] = peak_memory(trainer.strategy.root_device) / GIB
            # Tensors on the CPU: for a number, Lightning would wait for a copy to the GPU.
            named = {f"throughput/{name}": torch.tensor(value) for name, value in found.items()}
            pl_module.log_dict(named, prog_bar=True, rank_zero_only=True)

    def _rates(self, ranks: int) -> dict[str, float]:
        """The rates of all ranks; empty until the window is full."""
        computed, effective = self._computed.compute(), self._effective.compute()
        if "device/items_per_sec" not in computed:
            return {}
        rates = {
            "rows_per_second": computed["device/samples_per_sec"] * ranks,
            "tokens_per_second": computed["device/items_per_sec"] * ranks,
            "effective_tokens_per_second": effective["device/items_per_sec"] * ranks,
        }
        return rates | ({"utilization": computed["device/mfu"]} if "device/mfu" in computed else {})


def peak_memory(device: torch.device) -> int:
    """Peak bytes of memory on the GPU, or of this process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _computes_in_16_bits(trainer: Trainer) -> bool:
    return isinstance(trainer.precision_plugin, (HalfPrecision, MixedPrecision))
