"""Estimates the memory of a step without weights: the network runs on fake tensors, and a tracker counts bytes."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from models.learning.adamw_8bit import layout
from models.learning.optimizers import OptimizerName
from models.learning.training import BackboneModule
from models.networks.adapters import AdapterOptions
from models.networks.configurations import network_from_config
from models.networks.freezing import freeze_lowest
from models.networks.network_options import DtypeName, NetworkOptions
from models.networks.quantization import Quantization
from models.planning.replacements import insert_replacements

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Sharing = Literal["one device", "replicated", "sharded"]
MEASURED_LAYERS = (2, 4)  # numbers of layers that are run; each further layer adds the same
STATE_BLOCK, MIN_8_BIT = 256, 4096  # of bitsandbytes: values per scale; smallest tensor with an 8-bit state
CUDA_CONTEXT = 2**30  # assumed bytes of a GPU that CUDA and its libraries take
FAKE_TREE = ("input_ids", "position_ids", "subtree_end")  # tree fields with one entry per token


@dataclass(frozen=True)
class Setting:
    """The settings that determine the memory, together with the network and the micro-batch."""

    dtype: DtypeName
    precision: str  # of the trainer
    optimizer: OptimizerName
    checkpointing: bool = False
    adapter: AdapterOptions | None = None
    quantization: Quantization = "none"
    tokens: int | None = None  # of a tree; as many as the given tree has if None
    devices: int = 1
    sharing: Sharing = "one device"
    on_gpu: bool = False
    accumulates: bool = True  # whether a step has several micro-batches, so that gradients exist during the later ones


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak: in the backward pass of any step but the first."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # tensors for the backward pass, and temporary ones
    communication: int  # buffers of the exchange between ranks
    context: int  # of CUDA

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


class MemoryPlan:
    """The memory of a module with different settings.

    Args:
        module: A module without a network.
        config: Its network's configuration.
        micro_batch: The largest micro-batch. Only its shapes are used.
        attention: An attention of transformers, its default if None. The default is close to any attention that does
            not store tokens x tokens scores.
    """

    def __init__(
        self,
        module: BackboneModule,
        config: "PretrainedConfig",
        micro_batch: dict[str, Any],
        attention: str | None = None,
    ) -> None:
        self.attention = attention
        self.module = module
        self.frozen_layers: int = module.hparams["freeze_layers"]
        self.config = config
        self.micro_batch = micro_batch
        self._activations: dict[Setting, int] = {}

    def network(self, setting: Setting, layers: int | None = None) -> "PreTrainedModel":
        """The network on the meta device, with all its layers or `layers` of them."""
        settings = self.config.to_dict()
        if layers is not None:
            name = self.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            settings[name] = layers
            if settings.get("layer_types"):
                settings["layer_types"] = settings["layer_types"][:layers]
        dtype = compute_dtype(setting.precision) or setting.dtype
        options = NetworkOptions(self.module.head, dtype=dtype, attn_implementation=self.attention)
        with torch.device("meta"):
            network = network_from_config(options, settings)
        if setting.adapter is not None:
            # A precision that converts weights to 16 bits also converts adapters.
            adapter_dtype = getattr(torch, compute_dtype(setting.precision) or "float32")
            has_new_head = self.module.head == "classifier"
            insert_replacements(network, has_new_head, setting.adapter, setting.quantization, adapter_dtype)
        elif self.frozen_layers:
            freeze_lowest(network, self.frozen_layers if layers is None else 0)
        return network

    def memory(self, setting: Setting) -> Memory:
        """The memory of one rank."""
        network = self.network(setting)
        trained = [p for p in network.parameters() if p.requires_grad]
        ranks = setting.devices if setting.sharing == "sharded" else 1
        weights = sum(map(_bytes, network.parameters()))
        gradients = sum(map(_bytes, trained))
        return Memory(
            weights // ranks,
            gradients // ranks,
            sum(optimizer_bytes(p, setting.optimizer) for p in trained) // ranks,
            self.activations(setting),
            self._communication(network, setting, gradients),
            CUDA_CONTEXT if setting.on_gpu else 0,
        )

    def activations(self, setting: Setting) -> int:
        """The peak bytes of a micro-batch's backward pass, without weights and gradients."""
        key = replace(setting, optimizer="adamw", devices=1, on_gpu=False)
        if key not in self._activations:
            layers = getattr(self.config, "num_hidden_layers", 0)
            if layers <= max(MEASURED_LAYERS):
                self._activations[key] = self._tracked(setting, None)
            else:
                few, more = MEASURED_LAYERS
                bytes_few, bytes_more = self._tracked(setting, few), self._tracked(setting, more)
                per_layer = (bytes_more - bytes_few) / (more - few)
                with_gradients = layers if setting.adapter else layers - self.frozen_layers
                self._activations[key] = round(bytes_few + per_layer * (with_gradients - few))
        return self._activations[key]

    def _tracked(self, setting: Setting, layers: int | None) -> int:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mixed = setting.precision.endswith("-mixed")
        if setting.sharing == "sharded" and mixed:  # gathered weights are in 16 bits, without copies
            setting, mixed = replace(setting, precision=setting.precision.replace("mixed", "true")), False
        meta = self.network(setting, layers)
        with FakeTensorMode(allow_non_fake_inputs=True), _replaced_network(self.module, meta) as network:
            network.to_empty(device="cpu")
            if setting.checkpointing:
                network.gradient_checkpointing_enable({"use_reentrant": False})
            network.train()
            batch = _fake(self.micro_batch, setting.tokens)
            tracker = _tracker()
            tracker.track_external(network)
            half_precision = torch.float16 if setting.precision.startswith("16") else torch.bfloat16
            with tracker, torch.autocast("cpu", half_precision, enabled=mixed):
                for _ in range(2 if setting.accumulates else 1):
                    self.module.loss(batch).backward()
                    tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
            parameters = list(network.parameters())
            return peak - sum(_bytes(p) for p in parameters) - sum(_bytes(p) for p in parameters if p.requires_grad)

    def _communication(self, network: "PreTrainedModel", setting: Setting, gradients: int) -> int:
        """The buckets of gradients (DDP), or the weights that are gathered at the same time (FSDP2)."""
        if setting.sharing == "replicated":
            return gradients
        if setting.sharing == "one device" or setting.devices == 1:
            return 0
        blocks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
        sizes = [sum(p.numel() for p in block.parameters()) for layers in blocks for block in layers]
        rest = sum(p.numel() for p in network.parameters()) - sum(sizes)
        width = 4 if setting.precision.startswith("32") else 2
        return round(width * (rest + 2 * max(sizes, default=0)) + 4 * max(sizes, default=rest))


def compute_dtype(precision: str) -> DtypeName | None:
    """The dtype to which a precision converts a network's weights; None if it does not convert them."""
    return {"bf16-true": "bfloat16", "16-true": "float16"}.get(precision)  # type: ignore[return-value]


def optimizer_bytes(parameter: Tensor, name: OptimizerName) -> int:
    """The bytes of an optimizer's state for a parameter."""
    if name == "adamw_8bit":
        sizes = layout(parameter).values()
        return sum(shape.numel() * dtype.itemsize for shape, dtype in sizes)
    if name == "adamw" or parameter.numel() < MIN_8_BIT:
        return 2 * _bytes(parameter)
    return 2 * parameter.numel() + 2 * 4 * math.ceil(parameter.numel() / STATE_BLOCK)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tracker() -> Any:
    """PyTorch's memory tracker without hooks on gradients, which frozen weights cannot have, and peaks of modules."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

        def _update_peak_stats(self, peak_state: Any) -> None:
            """Called after each operation; for the peak of each module, it would visit all modules."""
            modules, self.memory_tracking = self.memory_tracking, type(self.memory_tracking)()
            try:
                super()._update_peak_stats(peak_state)
            finally:
                self.memory_tracking = modules

    return Tracker()


@contextlib.contextmanager
def _replaced_network(module: BackboneModule, network: "PreTrainedModel") -> "Iterator[PreTrainedModel]":
    module.network = network
    try:
        yield network
    finally:
        module.network = None


def _fake(value: Any, tokens: int | None, name: str = "") -> Any:
    """Zeros with the same shapes; for a tree with another number of tokens."""
    if isinstance(value, dict):
        is_tree = "subtree_end" in value
        return {key: _fake(part, tokens if is_tree or not name else None, key) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    shape = (1, tokens) if tokens is not None and name in FAKE_TREE else value.shape
    return torch.zeros(shape, dtype=value.dtype)
