"""Frozen linear layers in 8 or 4 bits (bitsandbytes)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["none", "int8", "nf4"]
PEFT_FLAGS = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}  # attributes of a network that peft reads


def quantize(
    network: "PreTrainedModel", layers: Mapping[str, nn.Module], kind: Quantization, device: torch.device | None
) -> None:
    """Replace layers by quantized ones, one after the other, so that the network never exists twice.

    Args:
        network: Changed in place.
        layers: The layers to replace, by name. Only nn.Linear can be quantized; others remain.
        kind: int8 or nf4.
        device: The device of the quantized layers; the layers' own if None.

    Raises:
        UserError: No layer is an nn.Linear.
    """
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not linear:
        raise UserError(
            f"model.quantization: the layers of {type(network).__name__} are not linear layers of PyTorch",
            "Use model.quantization none.",
        )
    quantized = _nf4 if kind == "nf4" else _int8
    for name, layer in linear.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, quantized(layer, device or layer.weight.device))
    setattr(network, PEFT_FLAGS[kind], True)


def _nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.weight, made.bias = weight.to(device), layer.bias
    made.compute_type_is_set = True  # compute in the dtype of each input, not in that of the first input
    # On a CPU with bfloat16 instructions the first evaluation would repack the weights with rounded scales, and
    # training would continue with them. Then a run would depend on whether it validated.
    made.support_avx512bf16_for_cpu = False
    return made


def _int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    made = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,  # larger inputs are not rounded, as in LLM.int8()
        device="meta",
    )
    weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight, made.bias = weight.to(device), layer.bias
    return made
