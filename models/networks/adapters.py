"""LoRA and QLoRA: a frozen base, quantized if wanted, with low-rank adapters that are trained and kept alone.

Adapters are put into the network itself, so that everything else goes on seeing a model of transformers.
"""

import hashlib
import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.ranges import FINITE, Count, ShareBelowOne, refuse_unsound
from models.networks.backbone import Head, reads_last_token
from models.networks.weight_files import naming, refuse_other_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("proactive")
Quantization = Literal["none", "int8", "nf4"]
NAME = "default"  # peft's own for the only adapter
ADAPTER_FILE = "adapter_model.safetensors"  # as peft names it
PREFIX = "base_model.model."  # what peft puts before a weight's name in its files
SMALL_SHARE = 0.01  # of the weights; what holds less is not named
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

    rank: Annotated[int, Ge(1), Le(2**16), FINITE] = 16
    alpha: Count = 32
    dropout: ShareBelowOne = 0.05
    targets: Literal["all-linear"] | list[str] = "all-linear"
    merge: bool = False

    def __post_init__(self) -> None:
        refuse_unsound(type(self), asdict(self), "model.adapter")


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
        reason = error_text(error, 200)
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

    targets, stored = target_layers(network, head, adapter), linear_layers(network)
    _say_left_out(network, targets, quantization, stored)
    if quantization != "none":
        _quantize(network, stored, quantization, device)
    try:
        inject_adapter_in_model(_lora_config(adapter, head, sorted(targets)), network, NAME)
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
        target_modules=layers,
    )


def target_layers(network: "PreTrainedModel", head: Head, adapter: AdapterOptions) -> dict[str, nn.Module]:
    """The layers that get adapters, by name; the network may be on the meta device.

    Raises:
        UserError: There are none, or a target is something else than a linear layer under the head, or an output layer
            of its own weights.
    """
    layers = linear_layers(network)
    if not layers:
        raise UserError(f"model.adapter: {type(network).__name__} has no linear layer", "Use another backbone.")
    if adapter.targets == "all-linear":
        return layers
    hint = f"Use all-linear, or some of {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}."
    output = network.get_output_embeddings()
    new = {id(module) for part in _head_modules(network, head) for module in part.modules()}
    found: dict[str, nn.Module] = {}
    for target in adapter.targets:
        named = {n: m for n, m in network.named_modules() if n == target or n.endswith(f".{target}")}
        what = f"model.adapter.targets: {target}"
        if not named:
            raise UserError(f"{what}: {type(network).__name__} has no such layer", hint)
        for name, module in named.items():
            if id(module) in new:
                raise UserError(f"{what} is in the new head, which is trained whole", hint)
            if isinstance(module, nn.Embedding):
                raise UserError(f"{what} are embeddings, and adapters go on linear layers", hint)
            if module is output and _is_tied(network, output):
                raise UserError(f"{what} shares its weights with the embeddings, which a merge would change too", hint)
            if name not in layers and module is not output:
                raise UserError(f"{what} is no linear layer but {type(module).__name__}", hint)
        found |= named
    return found


def _is_tied(network: "PreTrainedModel", output: nn.Module) -> bool:
    """Whether the output layer's weight is that of the embeddings."""
    return output.weight is getattr(network.get_input_embeddings(), "weight", None)


def never_quantized(network: "PreTrainedModel", head: Head) -> list[str]:
    """The names of the layers that are kept as they are when a backbone is quantized: what stands over it."""
    kept = [network.get_output_embeddings(), *_head_modules(network, head)]
    return [name for name, module in network.named_modules() if any(module is one for one in kept)]


def _say_left_out(
    network: "PreTrainedModel",
    targets: Mapping[str, nn.Module],
    quantization: Quantization,
    stored: Mapping[str, nn.Module],
) -> None:
    """Say which share of the weights gets adapters or is quantized, and what does not."""
    share, others = _share(network, targets)
    log.info(f"model.adapter: adapters on {len(targets)} layers, which hold {share:.1%} of the weights; {others}")
    if quantization != "none":
        share, others = _share(network, stored)
        log.info(f"model.quantization: {share:.1%} of the weights are kept in {quantization}; {others}")
    if fused := _fused_experts(network):
        share = sum(fused.values()) / sum(parameter.numel() for parameter in network.parameters())
        log.warning(
            f"model.adapter: {', '.join(fused)} are no linear layers, for one tensor holds several experts: "
            f"{share:.1%} of the weights get no adapter and are not quantized"
        )


def _fused_experts(network: "PreTrainedModel") -> Counter[str]:
    """How many weights are in tensors that hold one matrix for each of several experts, by where they are."""
    fused = Counter[str]()
    for module in network.base_model.modules():
        if not isinstance(module, nn.modules.conv._ConvNd):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2:
                    fused[f"{type(module).__name__}.{name}"] += parameter.numel()
    return fused


def _share(network: "PreTrainedModel", layers: Mapping[str, nn.Module]) -> tuple[float, str]:
    """Which share of a network's weights is in some layers, and where the others are."""
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    total, covered, others = 0, 0, Counter[str]()
    for name, parameter in network.named_parameters():
        total += parameter.numel()
        if id(parameter) in inside:
            covered += parameter.numel()
        else:
            others[".".join(name.split(".")[-2:])] += parameter.numel()
    shares = [f"{name} {count / total:.1%}" for name, count in others.most_common() if count >= SMALL_SHARE * total]
    return covered / total, f"not {', '.join(shares) or 'norms and biases'}"


def linear_layers(network: "PreTrainedModel") -> dict[str, nn.Module]:
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
    save_file(renamed, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = network.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    heads = [module for module in _head_modules(network, head) if list(module.parameters())]
    config.modules_to_save = [name for name, module in network.named_children() if module in heads] or None
    config.save_pretrained(folder)


def load_adapter(network: "PreTrainedModel", folder: Path) -> None:
    """Load what `save_adapter` wrote into a network with adapters.

    Raises:
        UserError: The file does not hold them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state, path = network.state_dict(), folder / ADAPTER_FILE
    names = {PREFIX + name.replace(f".{NAME}.", "."): name for name in trained_names(network)}
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}", "Give the export folder of a run.") from error
    with naming(path):
        refuse_other_tensors(loaded, {name: state[own] for name, own in names.items()})
    network.load_state_dict({names[name]: weight for name, weight in loaded.items()}, strict=False)


def merged_state(network: "PreTrainedModel", quantization: Quantization) -> dict[str, Tensor]:
    """The weights of a network with adapters, as those of a plain one: base, dequantized, plus adapter.

    Each is summed in float32 and rounded once to the dtype of the network.
    """
    from peft.utils.integrations import dequantize_module_weight

    state = dict(network.state_dict())
    for name, layer in _changed_layers(network, quantization):
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = dequantize_module_weight(base).float()
        if layer is not base:
            weight = weight + layer.get_delta_weight(NAME).float()
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.weight"] = weight
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias.detach()
    return {name: weight.to("cpu", network.dtype) for name, weight in state.items()}


def _changed_layers(network: nn.Module, quantization: Quantization) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, are quantized, or both."""
    from peft.tuners.lora import LoraLayer

    kinds: tuple[type, ...] = (LoraLayer,)
    if quantization != "none":
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        kinds = (LoraLayer, Linear4bit, Linear8bitLt)
    for name, module in network.named_modules():
        if isinstance(module, kinds) and not name.endswith(".base_layer"):
            yield name, module
