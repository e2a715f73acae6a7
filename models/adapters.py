"""LoRA and QLoRA: a frozen base, quantized if wanted, with low-rank adapters that are trained and kept alone.

Adapters are put into the network itself, so that everything else goes on seeing a model of transformers.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from datamodules.errors import UserError
from models.backbone import Head, reads_last_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["none", "int8", "nf4"]
NAME = "default"  # peft's own for the only adapter
WEIGHTS_FILE = "adapter_model.safetensors"  # as peft names it
PREFIX = "base_model.model."  # what peft puts before a weight's name in its files
SAMPLE = 256  # values of each tensor that a base's digest reads
SAVED_TASKS: dict[Head, str] = {"classifier": "SEQ_CLS", "language model": "CAUSAL_LM"}  # as peft names them


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters (LoRA) on linear layers: what is trained in place of all weights.

    Args:
        rank: Of the two matrices that each adapted layer gets.
        alpha: Their product is added alpha / rank times.
        dropout: On what they read.
        targets: "all-linear" for every linear layer under the head, or the names of layers, such as [q_proj, v_proj].
        merge: Whether an export holds base and adapter merged into one model, in place of the adapter alone.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: Literal["all-linear"] | list[str] = "all-linear"
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"model.adapter.rank: {self.rank} is no rank", "Give 1 or more; 16 is a good start.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.adapter.dropout: {self.dropout} is no share", "Give a number from 0 to below 1.")


def refuse_unfit(adapter: AdapterOptions | None, quantization: Quantization, strategy: Strategy | None = None) -> None:
    """Say what does not go together, or is not installed, before any weight is loaded.

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
    _installed("peft", "model.adapter", 'Install it: pip install -e ".[adapters]"')
    if quantization != "none":
        _installed("bitsandbytes", "model.quantization", "Use model.quantization none.")


def _installed(package: str, option: str, hint: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # bitsandbytes' import fails in many ways where its native library does not load
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{option}: {package} does not load: {reason}", hint) from error


def add_adapter(
    network: "PreTrainedModel",
    head: Head,
    adapter: AdapterOptions,
    quantization: Quantization = "none",
    device: torch.device | None = None,
) -> None:
    """Freeze a network, quantize it, and put adapters in; what is trained is theirs and a classifier's head.

    Args:
        network: Any of transformers; changed in place.
        head: What it ends in. A classifier's is new, and is trained with the adapters.
        adapter: What to put in.
        quantization: How the frozen linear layers are stored.
        device: Where they are quantized; where they are if None.
    """
    from peft import inject_adapter_in_model

    layers = _linear_layers(network)
    if not layers:
        raise UserError(f"model.adapter: {type(network).__name__} has no linear layer", "Use another backbone.")
    if quantization != "none":
        _quantize(network, layers, quantization, device)
    try:
        inject_adapter_in_model(_lora_config(adapter, head, sorted(layers)), network, NAME)
    except ValueError as error:  # no layer has such a name
        raise UserError(
            f"model.adapter.targets: {' '.join(str(error).split())[:200]}",
            f"Use all-linear, or some of {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}.",
        ) from error
    finally:
        network.__dict__.pop(LOADED[quantization], None)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # updates are small; they would be lost in 16 bits
    for module in _head_modules(network, head):
        module.requires_grad_(True)
        if reads_last_token(network):  # `classify` then takes care of the states' dtype
            module.float()


def _lora_config(adapter: AdapterOptions, head: Head, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type=SAVED_TASKS[head],
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=layers if adapter.targets == "all-linear" else adapter.targets,
    )


def _linear_layers(network: "PreTrainedModel") -> dict[str, nn.Module]:
    """The linear layers under the head, by name."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's

    outside = {id(network.get_output_embeddings())}
    inside = {id(module) for module in network.base_model.modules()} - outside
    return {
        name: module
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }


def _head_modules(network: "PreTrainedModel", head: Head) -> list[nn.Module]:
    """What of a classifier is new: all that is outside its backbone."""
    if head != "classifier":
        return []
    return [module for module in network.children() if module is not network.base_model]


# Quantization

LOADED = {"none": "", "int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}  # by which peft knows of it


def _quantize(
    network: "PreTrainedModel", layers: Mapping[str, nn.Module], kind: Quantization, device: torch.device | None
) -> None:
    """Store layers in 8 or 4 bits, one after the other, so that no two copies of the network exist."""
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not linear:
        raise UserError(
            f"model.quantization: {type(network).__name__} keeps its weights in layers of its own",
            "Use model.quantization none.",
        )
    for name, layer in linear.items():
        parent, _, child = name.rpartition(".")
        made = (_nf4 if kind == "nf4" else _int8)(layer, device or layer.weight.device)
        setattr(network.get_submodule(parent), child, made)
    setattr(network, LOADED[kind], True)


def _nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.weight, made.bias = weight.to(device), layer.bias
    made.compute_type_is_set = True  # it computes in the dtype of what it reads, not in that of its first input
    # On a CPU with bfloat16 instructions a first evaluation would pack the weights anew with rounded scales, and
    # training would go on with those: a run that validated would be another one than a run that did not.
    made.support_avx512bf16_for_cpu = False
    return made


def _int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    made = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,  # inputs beyond it stay as they are, as LLM.int8() has it
        device="meta",
    )
    weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight, made.bias = weight.to(device), layer.bias
    return made


# Keeping


def trained_names(module: nn.Module) -> set[str]:
    """The names of the weights that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def base_digest(network: "PreTrainedModel", head: Head) -> str:
    """A digest of a base: of the names and shapes of its tensors, and of `SAMPLE` values of each.

    It is taken before the base is quantized, so that it is the same on every device.
    """
    new = {id(p) for module in _head_modules(network, head) for p in module.parameters()}
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        if id(parameter) not in new:
            flat = parameter.detach().flatten()
            sample = flat[:: max(len(flat) // SAMPLE, 1)][:SAMPLE].float().cpu()
            digest.update(json.dumps([name, list(parameter.shape), sample.tolist()]).encode())
    return digest.hexdigest()


def save_adapter(network: "PreTrainedModel", head: Head, base: str, folder: Path) -> None:
    """Write adapters, and a classifier's head, as `PeftModel.from_pretrained` loads them.

    Args:
        network: What `add_adapter` has changed.
        head: What it ends in.
        base: The hub id or path of its base.
        folder: Where to, made if missing.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = trained_names(network)
    state = {name: weight for name, weight in network.state_dict().items() if name in trained}
    renamed = {PREFIX + name.replace(f".{NAME}.", "."): weight.contiguous().cpu() for name, weight in state.items()}
    save_file(renamed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = network.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    heads = _head_modules(network, head)
    config.modules_to_save = [name for name, module in network.named_children() if module in heads] or None
    config.save_pretrained(folder)


def load_adapter(network: "PreTrainedModel", folder: Path) -> None:
    """Load what `save_adapter` wrote into a network with adapters.

    Raises:
        UserError: The file does not hold them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = {PREFIX + name.replace(f".{NAME}.", "."): name for name in trained_names(network)}
    try:
        loaded = load_file(folder / WEIGHTS_FILE)
        if set(loaded) != set(names):
            raise ValueError(f"it holds {len(loaded)} weights where {len(names)} are needed")
        network.load_state_dict({names[name]: weight for name, weight in loaded.items()}, strict=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {' '.join(str(error).split())[:200]}", "Give the export folder of a run."
        ) from error


def merged_state(network: "PreTrainedModel") -> dict[str, Tensor]:
    """The weights of a network with adapters, as those of a plain one: base, dequantized, plus adapter.

    Each is summed in float32 and rounded once to the dtype of the network.
    """
    from peft.utils.integrations import dequantize_module_weight

    state = dict(network.state_dict())
    for name, layer in _changed_layers(network):
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = dequantize_module_weight(base).float()
        if layer is not base:
            weight = weight + layer.get_delta_weight(NAME).float()
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = weight
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias.detach()
    return {name: weight.to("cpu", network.dtype) for name, weight in state.items()}


def _changed_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, are quantized, or both."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer | Linear4bit | Linear8bitLt) and not name.endswith(".base_layer"):
            yield name, module
