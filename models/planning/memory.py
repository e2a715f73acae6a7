"""Estimates the memory of a step without weights: it runs the network on shapes, and a tracker counts bytes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from models.learning.adamw_8bit import layout
from models.learning.optimizers import OptimizerName
from models.learning.training import BackboneModule
from models.networks.adapters import AdapterOptions
from models.networks.configurations import network_from_config
from models.networks.network_options import DtypeName, NetworkOptions
from models.networks.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Sharing = Literal["one device", "replicated", "sharded"]
LAYERS_TRIED = (2, 4)  # numbers of layers that are run; each further layer adds the same
STATE_BLOCK, LEAST_8_BIT = 256, 4096  # of bitsandbytes: values per scale; smallest tensor with an 8-bit state
CONTEXT = 2**30  # bytes of a GPU for CUDA and its libraries; an assumption
FAKE_TREE = ("input_ids", "position_ids", "subtree_end")  # tree fields with one entry per token


@dataclass(frozen=True)
class Setting:
    """What determines the memory, besides network and micro-batch."""

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
            _insert_replacements(network, self.module.head == "classifier", setting)
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
            CONTEXT if setting.on_gpu else 0,
        )

    def activations(self, setting: Setting) -> int:
        """The peak bytes of a micro-batch's backward pass, without weights and gradients."""
        key = replace(setting, optimizer="adamw", devices=1, on_gpu=False)
        if key not in self._activations:
            layers = getattr(self.config, "num_hidden_layers", 0)
            if layers <= max(LAYERS_TRIED):
                self._activations[key] = self._tracked(setting, None)
            else:
                few, more = LAYERS_TRIED
                bytes_few, bytes_more = self._tracked(setting, few), self._tracked(setting, more)
                per_layer = (bytes_more - bytes_few) / (more - few)
                self._activations[key] = round(bytes_few + per_layer * (layers - few))
        return self._activations[key]

    def _tracked(self, setting: Setting, layers: int | None) -> int:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mixed = setting.precision.endswith("-mixed")
        if setting.sharing == "sharded" and mixed:  # gathered weights are in 16 bits, without copies
            setting, mixed = replace(setting, precision=setting.precision.replace("mixed", "true")), False
        meta = self.network(setting, layers)
        with FakeTensorMode(allow_non_fake_inputs=True), _in_place_of(self.module, meta) as network:
            network.to_empty(device="cpu")
            if setting.checkpointing:
                network.gradient_checkpointing_enable({"use_reentrant": False})
            network.train()
            batch = _fake(self.micro_batch, setting.tokens)
            tracker = _tracker()
            tracker.track_external(network)
            sixteen = torch.float16 if setting.precision.startswith("16") else torch.bfloat16
            with tracker, torch.autocast("cpu", sixteen, enabled=mixed):
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
    if name == "adamw" or parameter.numel() < LEAST_8_BIT:
        return 2 * _bytes(parameter)
    return 2 * parameter.numel() + 2 * 4 * math.ceil(parameter.numel() / STATE_BLOCK)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tracker() -> Any:
    """PyTorch's memory tracker without hooks on gradients, which frozen weights cannot have."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    return Tracker()


@contextlib.contextmanager
def _in_place_of(module: BackboneModule, network: "PreTrainedModel") -> "Iterator[PreTrainedModel]":
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


# Replacements of quantized layers and adapters, whose libraries do not run on shapes alone


class _Dequantized(torch.autograd.Function):
    """A product with a weight that is dequantized temporarily, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input_TD: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return nn.functional.linear(input_TD, torch.empty(shape, dtype=input_TD.dtype, device=input_TD.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device), None, None


class _Quantized(nn.Module):
    def __init__(self, layer: nn.Linear, kind: Quantization) -> None:
        super().__init__()
        numel, self.shape = layer.weight.numel(), layer.weight.shape
        # NF4: 2 weights per byte, 1 byte per scale of 64 weights, 4 bytes per 256 scales. Int8: 4 bytes per row.
        size = numel // 2 + numel // 64 + numel // 64 // 64 if kind == "nf4" else numel + 4 * self.shape[0]
        packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        vars(self.weight)["quant_state"] = SimpleNamespace(shape=self.shape)  # read by `weight_count`
        self.bias = layer.bias

    def forward(self, input_TD: Tensor) -> Tensor:
        output = _Dequantized.apply(input_TD, self.weight, self.shape)
        return output if self.bias is None else output + self.bias


class _Adapted(nn.Module):
    """The computation of peft's LoRA layer."""

    def __init__(self, layer: nn.Module, width: tuple[int, int], adapter: AdapterOptions, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.lora_A = nn.Linear(width[0], adapter.rank, bias=False, device="meta", dtype=dtype)
        self.lora_B = nn.Linear(adapter.rank, width[1], bias=False, device="meta", dtype=dtype)
        self.dropout = nn.Dropout(adapter.dropout) if adapter.dropout else nn.Identity()
        self.scaling = adapter.alpha / adapter.rank

    def forward(self, input_TD: Tensor) -> Tensor:
        output = self.layer(input_TD)
        adapted_TD = input_TD if torch.is_autocast_enabled("cpu") else input_TD.to(self.lora_A.weight.dtype)
        return (output + self.lora_B(self.lora_A(self.dropout(adapted_TD))) * self.scaling).to(output.dtype)


def _insert_replacements(network: "PreTrainedModel", new_head: bool, setting: Setting) -> None:
    adapter = setting.adapter
    assert adapter is not None
    network.requires_grad_(False)
    # A precision that converts weights to 16 bits also converts adapters.
    dtype = getattr(torch, compute_dtype(setting.precision) or "float32")
    outputs = network.get_output_embeddings()
    for parent in list(network.base_model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or layer is outputs:
                continue
            stored = layer if setting.quantization == "none" else _Quantized(layer, setting.quantization)
            if adapter.targets == "all-linear" or name in adapter.targets:
                made: nn.Module = _Adapted(stored, (layer.in_features, layer.out_features), adapter, dtype)
            else:
                made = stored
            setattr(parent, name, made)
    if new_head:
        for module in network.children():
            if module is not network.base_model:
                module.to(dtype).requires_grad_(True)


# Changes of settings


@dataclass(frozen=True)
class Change:
    """A change of settings that saves memory.

    Attributes:
        what: The change in words.
        option: The command-line options of the change.
        apply: Returns the changed setting.
    """

    what: str
    option: str
    apply: Callable[[Setting], Setting]


def changes(longest: int, setting: Setting) -> list[Change]:
    """The changes that save memory, cheapest first.

    Args:
        longest: Tokens of the longest row, which is the smallest possible tree.
        setting: The current setting.
    """
    found = []
    if setting.tokens is not None and setting.tokens > longest:
        found.append(
            Change(
                f"a smaller token budget, {longest}",
                f"--data.token_budget {longest}",
                lambda s: replace(s, tokens=longest),
            )
        )
    if not setting.checkpointing:
        found.append(
            Change(
                "gradient checkpointing, for a third more operations",
                "--model.gradient_checkpointing true",
                lambda s: replace(s, checkpointing=True),
            )
        )
    if setting.optimizer == "adamw" and setting.adapter is None:
        found.append(
            Change("an 8-bit optimizer", "--model.optimizer adamw_8bit", lambda s: replace(s, optimizer="adamw_8bit"))
        )
    if setting.adapter is None:
        for devices in (2, 4, 8, 16, 32, 64):
            if devices > setting.devices:
                found.append(_more_devices(devices))
        found.append(
            Change(
                "an adapter in place of all weights",
                "--model.adapter.rank 16",
                lambda s: replace(s, adapter=AdapterOptions(), devices=1, sharing="one device"),
            )
        )
    if setting.quantization == "none":
        found.append(
            Change(
                "an adapter on weights in 4 bits",
                "--model.adapter.rank 16 --model.quantization nf4 --model.dtype bfloat16",
                lambda s: replace(
                    s,
                    adapter=s.adapter or AdapterOptions(),
                    quantization="nf4",
                    dtype="bfloat16",
                    devices=1,
                    sharing="one device",
                ),
            )
        )
    return found


def _more_devices(devices: int) -> Change:
    return Change(
        f"{devices} devices that share weights, gradients and optimizer",
        f"--trainer.devices {devices} --trainer.strategy fully_sharded",
        lambda s: replace(s, devices=devices, sharing="sharded"),
    )


def cheapest_fit(plan: MemoryPlan, setting: Setting, longest: int, room: int) -> tuple[list[Change], Memory] | None:
    """The cheapest changes with which a setting fits.

    A single change is preferred. Otherwise the first changes are combined until the setting fits.

    Args:
        plan: Estimates the memory.
        setting: The current setting.
        longest: Tokens of the longest row.
        room: Bytes of one device.

    Returns:
        The changes and the memory with them; None if the setting does not fit with all changes.
    """
    offered = changes(longest, setting)
    for change in offered:
        if (memory := plan.memory(change.apply(setting))).peak <= room:
            return [change], memory
    together: list[Change] = []
    devices_tried: Change | None = None
    for change in offered:
        if "devices" in change.option:  # a larger number of devices replaces a smaller one
            together = [one for one in together if one is not devices_tried]
            devices_tried = change
        together.append(change)
        changed = setting
        for one in together:
            changed = one.apply(changed)
        if (memory := plan.memory(changed)).peak <= room:
            return list(together), memory
    return None
