"""Files of adapters: the description of their base, saving and loading, and the merge of base and adapter."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from models.networks.adapters import NAME, head_modules
from models.networks.network_options import Head
from models.networks.quantization import Quantization
from models.networks.weight_files import naming_file, refuse_other_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's file names
PREFIX = "base_model.model."  # peft's prefix of weight names in files
SAMPLE = 256  # values of each tensor that enter a base's digest


@dataclass(frozen=True)
class AdapterBase:
    """The frozen network that an adapter is for. A checkpoint stores this instead of the network.

    Attributes:
        backbone: Hub id, local path or "scratch".
        digest: SHA-256 of the names and shapes of its tensors, and of `SAMPLE` values of each.
    """

    backbone: str
    digest: str

    @classmethod
    def of(cls, network: "PreTrainedModel", head: Head, backbone: str) -> Self:
        """Describe a network before adapters are added and layers are quantized.

        So the digest is the same on each device. A classifier's head is not part of it.
        """
        new = {id(p) for module in head_modules(network, head) for p in module.parameters()}
        digest = hashlib.sha256()
        for name, parameter in network.named_parameters():
            if id(parameter) not in new:
                flat = parameter.detach().flatten()
                sample = flat[:: max(len(flat) // SAMPLE, 1)][:SAMPLE].float().cpu()
                digest.update(json.dumps([name, list(parameter.shape), sample.tolist()]).encode())
        return cls(backbone, digest.hexdigest())

    def refuse_other(self, saved: Mapping[str, str] | None) -> None:
        """Refuse an adapter that was trained on another base.

        Args:
            saved: The fields of the adapter's base, from its checkpoint or export.

        Raises:
            UserError: The digests differ.
        """
        saved = saved or {}
        if saved.get("digest") != self.digest:
            raise UserError(
                f"the adapter's base was {saved.get('backbone')}, and {self.backbone} has other weights now",
                "Put the base back that the adapter was trained on, or start a new run.",
            )


def trained_names(module: nn.Module) -> set[str]:
    """The names of the trained weights."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_adapter(network: "PreTrainedModel", head: Head, base: str, folder: Path, dtype: str | None = None) -> None:
    """Write adapters, and a classifier's head, in the format of `PeftModel.from_pretrained`.

    Args:
        network: A network with adapters, see `models.networks.adapters.add_adapter`.
        head: The network's head.
        base: The hub id or path of its base.
        folder: Created if missing.
        dtype: The dtype of the weights; their own if None.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = trained_names(network)
    state = {name: weight for name, weight in network.state_dict().items() if name in trained}
    state = state if dtype is None else rounded(state, dtype)
    renamed = {_name_in_file(name): weight.contiguous().cpu() for name, weight in state.items()}
    save_file(renamed, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = network.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    heads = [module for module in head_modules(network, head) if list(module.parameters())]
    config.modules_to_save = [name for name, module in network.named_children() if module in heads] or None
    config.save_pretrained(folder)


def rounded(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights of a state dict, rounded to a dtype and on the CPU. Tied weights stay one tensor."""
    found: dict[Any, Tensor] = {}
    for weight in state.values():
        if (place := (weight.data_ptr(), weight.shape)) not in found:
            found[place] = weight.to("cpu", getattr(torch, dtype) if weight.is_floating_point() else weight.dtype)
    return {name: found[weight.data_ptr(), weight.shape] for name, weight in state.items()}


def load_adapter(network: "PreTrainedModel", folder: Path) -> None:
    """Load the files of `save_adapter` into a network with adapters.

    Raises:
        UserError: The file does not have exactly the tensors of the adapters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state, path = network.state_dict(), folder / ADAPTER_FILE
    names = {_name_in_file(name): name for name in trained_names(network)}
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}", "Give the export folder of a run.") from error
    with naming_file(path):
        refuse_other_tensors(loaded, {name: state[own] for name, own in names.items()})
    network.load_state_dict({names[name]: weight for name, weight in loaded.items()}, strict=False)


def _name_in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


def merged_state(network: "PreTrainedModel", quantization: Quantization) -> dict[str, Tensor]:
    """The state dict of a plain network: the dequantized base plus its adapters.

    Each sum is computed in float32 and rounded once, to the dtype of the network.
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
    """The layers with an adapter, and the quantized ones."""
    from peft.tuners.lora import LoraLayer

    kinds: tuple[type, ...] = (LoraLayer,)
    if quantization != "none":
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        kinds = (LoraLayer, Linear4bit, Linear8bitLt)
    for name, module in network.named_modules():
        if isinstance(module, kinds) and not name.endswith(".base_layer"):
            yield name, module
