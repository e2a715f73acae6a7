"""Sizes of the files that a run writes: checkpoints and export."""

from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.batching.rows import RowsDataModule
from datamodules.files.run_folders import EXPORT
from models.learning.checkpoint_paths import BEST, LAST
from models.learning.training import BackboneModule
from models.planning.memory import MemoryPlan, Setting, optimizer_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def file_sizes(
    model: BackboneModule,
    data: RowsDataModule,
    plan: MemoryPlan,
    setting: Setting,
    resumable_best: bool,
    export_dtype: str | None,
) -> dict[str, int]:
    """Estimate the bytes of last.ckpt, best.ckpt and the export, without small values such as options.

    Args:
        model: The module, without a network.
        data: Its data, set up.
        plan: Gives its network without weights.
        setting: The settings of the run.
        resumable_best: Whether best.ckpt contains the optimizer's state.
        export_dtype: The dtype of the export's weights; that of the network if None.
    """
    network = plan.network(setting)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    weights = _bytes(trained) if model.adapter else _weight_bytes(network)
    state = sum(optimizer_bytes(weight, setting.optimizer) for weight in trained)
    exported = weights
    if model.adapter and not model.exports_adapter:  # base and adapter become one network
        network = plan.network(replace(setting, adapter=None, quantization="none"))
        exported = _weight_bytes(network)
    if export_dtype is not None:
        own = (trained[0] if model.exports_adapter else next(network.parameters())).dtype
        exported = exported * getattr(torch, export_dtype).itemsize // own.itemsize
    described = BytesIO()
    torch.save(data.state_dict(), described)  # the tokenizer, and digests of the histories
    rest = len(described.getvalue())
    best = weights + (state if resumable_best else 0)
    return {LAST: weights + state + rest, BEST: best + rest, EXPORT: exported + rest}


def _weight_bytes(network: "PreTrainedModel") -> int:
    """The bytes of all tensors that are saved; tied weights count once."""
    saved = network.state_dict().keys()
    return _bytes(network.parameters()) + _bytes(b for name, b in network.named_buffers() if name in saved)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
