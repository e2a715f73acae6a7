"""LoRA and QLoRA: low-rank adapters on a frozen base, which can be quantized.

Adapters are inserted into the network itself, so that all other code still sees a model of transformers.
"""

import importlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.ranges import FINITE, Count, FractionBelowOne, check_ranges
from models.networks.heads import reads_last_token
from models.networks.network_options import Head
from models.networks.quantization import PEFT_FLAGS, Quantization, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("proactive")
NAME = "default"  # peft's name of a single adapter
SMALL_FRACTION = 0.01  # of the weights; smaller parts are not logged
TASK_TYPES: dict[Head, str] = {"classifier": "SEQ_CLS", "language model": "CAUSAL_LM"}  # peft's names


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters (LoRA) on linear layers, trained instead of all weights.

    Args:
        rank: Rank of the two matrices of each adapter.
        alpha: The product of the two matrices is scaled by alpha / rank.
        dropout: Dropout on the adapters' inputs.
        targets: "all-linear" for every linear layer below the head, or names of layers, such as [q_proj, v_proj].
        merge: Whether an export merges base and adapter into one model. Otherwise it contains only the adapter.
    """

    rank: Annotated[int, Ge(1), Le(2**16), FINITE] = 16
    alpha: Count = 32
    dropout: FractionBelowOne = 0.05
    targets: Literal["all-linear"] | list[str] = "all-linear"
    merge: bool = False

    def __post_init__(self) -> None:
        check_ranges(type(self), asdict(self), "model.adapter")


def refuse_unfit_adapter(
    adapter: AdapterOptions | None, quantization: Quantization, strategy: Strategy | None = None
) -> None:
    """Refuse options that do not fit together, and missing libraries, before weights are loaded.

    Raises:
        UserError: A quantized backbone without an adapter, an adapter on a sharded backbone, or a missing library.
    """
    if adapter is None:
        if quantization != "none":
            raise UserError(
                f"model.quantization: the weights of a backbone in {quantization} cannot be trained",
                "Give model.adapter as well, for example --model.adapter.rank 16, or leave model.quantization out.",
            )
        return
    if strategy is not None and not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise UserError(
            f"model.adapter: the backbone of an adapter is not sharded, but the strategy is {type(strategy).__name__}",
            "Use --trainer.strategy auto or ddp: each device then holds the whole frozen backbone.",
        )
    _require("peft", "model.adapter", 'Install it: pip install -e ".[adapters]"')
    if quantization != "none":
        _require("bitsandbytes", "model.quantization", "Use model.quantization none.")


def _require(package: str, option: str, hint: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # bitsandbytes raises errors of many types if its native library does not load
        raise UserError(f"{option}: {package} does not load: {error_text(error, 200)}", hint) from error


def add_adapter(
    network: "PreTrainedModel",
    head: Head,
    adapter: AdapterOptions,
    quantization: Quantization = "none",
    device: torch.device | None = None,
) -> None:
    """Freeze a network, quantize it, and insert adapters. Only adapters and a classifier's head are trained.

    Args:
        network: Any network of transformers; changed in place.
        head: The network's head. The head of a classifier is new, so it is trained with the adapters.
        adapter: Options of the adapters.
        quantization: How the frozen linear layers are stored.
        device: The device of the quantized layers; their own if None.
    """
    from peft import inject_adapter_in_model

    targets, frozen = target_layers(network, head, adapter), linear_layers(network)
    _log_coverage(network, targets, quantization, frozen)
    if quantization != "none":
        quantize(network, frozen, quantization, device)
    try:
        inject_adapter_in_model(_lora_config(adapter, head, sorted(targets)), network, NAME)
    finally:
        if quantization != "none":
            network.__dict__.pop(PEFT_FLAGS[quantization], None)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # 16 bits would lose small updates
    for module in head_modules(network, head):
        module.requires_grad_(True)
        if reads_last_token(network):  # then `classify_states` converts the hidden states
            module.float()


def _lora_config(adapter: AdapterOptions, head: Head, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type=TASK_TYPES[head],
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=layers,
    )


def target_layers(network: "PreTrainedModel", head: Head, adapter: AdapterOptions) -> dict[str, nn.Module]:
    """The layers that get adapters, by name. The network may be on the meta device.

    Raises:
        UserError: There is no such layer, or a target is not a linear layer below the head, or an output layer whose
            weights are tied to the embeddings.
    """
    layers = linear_layers(network)
    if not layers:
        raise UserError(f"model.adapter: {type(network).__name__} has no linear layer", "Use another backbone.")
    if adapter.targets == "all-linear":
        return layers
    hint = f"Use all-linear, or some of {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}."
    output = network.get_output_embeddings()
    new = {id(module) for part in head_modules(network, head) for module in part.modules()}
    found: dict[str, nn.Module] = {}
    for target in adapter.targets:
        named = {n: m for n, m in network.named_modules() if n == target or n.endswith(f".{target}")}
        what = f"model.adapter.targets: {target}"
        if not named:
            raise UserError(f"{what}: {type(network).__name__} has no such layer", hint)
        for name, module in named.items():
            if id(module) in new:
                raise UserError(f"{what} is in the new head, which is trained as a whole", hint)
            if isinstance(module, nn.Embedding):
                raise UserError(f"{what} is an embedding, but adapters need linear layers", hint)
            if module is output and _is_tied(network, output):
                raise UserError(f"{what} shares its weights with the embeddings, which a merge would change too", hint)
            if name not in layers and module is not output:
                raise UserError(f"{what} is not a linear layer but a {type(module).__name__}", hint)
        found |= named
    return found


def _is_tied(network: "PreTrainedModel", output: nn.Module) -> bool:
    """Whether the output layer and the embeddings share their weight."""
    return output.weight is getattr(network.get_input_embeddings(), "weight", None)


def never_quantized(network: "PreTrainedModel", head: Head) -> list[str]:
    """The names of the layers above the backbone, which are not quantized."""
    kept = [network.get_output_embeddings(), *head_modules(network, head)]
    return [name for name, module in network.named_modules() if any(module is one for one in kept)]


def _log_coverage(
    network: "PreTrainedModel",
    targets: Mapping[str, nn.Module],
    quantization: Quantization,
    frozen: Mapping[str, nn.Module],
) -> None:
    """Log which fraction of the weights gets adapters, which is quantized, and which is left out."""
    fraction, others = _coverage(network, targets)
    log.info(f"model.adapter: adapters on {len(targets)} layers, which hold {fraction:.1%} of the weights; {others}")
    if quantization != "none":
        fraction, others = _coverage(network, frozen)
        log.info(f"model.quantization: {fraction:.1%} of the weights are kept in {quantization}; {others}")
    if fused := _fused_experts(network):
        fraction = sum(fused.values()) / sum(parameter.numel() for parameter in network.parameters())
        log.warning(
            f"model.adapter: {', '.join(fused)} are not linear layers, because one tensor holds several experts: "
            f"{fraction:.1%} of the weights get no adapter and are not quantized"
        )


def _fused_experts(network: "PreTrainedModel") -> Counter[str]:
    """The number of weights in tensors with one matrix per expert, by class and name."""
    fused = Counter[str]()
    for module in network.base_model.modules():
        if not isinstance(module, nn.modules.conv._ConvNd):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2:
                    fused[f"{type(module).__name__}.{name}"] += parameter.numel()
    return fused


def _coverage(network: "PreTrainedModel", layers: Mapping[str, nn.Module]) -> tuple[float, str]:
    """The fraction of a network's weights in some layers, 0 to 1, and a phrase that lists the largest other parts."""
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    total, covered, others = 0, 0, Counter[str]()
    for name, parameter in network.named_parameters():
        total += parameter.numel()
        if id(parameter) in inside:
            covered += parameter.numel()
        else:
            others[".".join(name.split(".")[-2:])] += parameter.numel()
    largest = [f"{name} {count / total:.1%}" for name, count in others.most_common() if count >= SMALL_FRACTION * total]
    return covered / total, f"not {', '.join(largest) or 'norms and biases'}"


def linear_layers(network: "PreTrainedModel") -> dict[str, nn.Module]:
    """The linear layers below the head, by name."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    outside = {id(network.get_output_embeddings())}
    inside = {id(module) for module in network.base_model.modules()} - outside
    return {
        name: module
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }


def head_modules(network: "PreTrainedModel", head: Head) -> list[nn.Module]:
    """The new modules of a classifier: all those outside its backbone. A language model has none."""
    if head != "classifier":
        return []
    return [module for module in network.children() if module is not network.base_model]
