"""Replacements of quantized layers and adapters. Their libraries do not run on tensors without values."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.networks.adapters import AdapterOptions
from models.networks.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def insert_replacements(
    network: "PreTrainedModel",
    has_new_head: bool,
    adapter: AdapterOptions,
    quantization: Quantization,
    adapter_dtype: torch.dtype,
) -> None:
    """Freeze a network and replace its linear layers, as `models.networks.adapters.add_adapter` does.

    Args:
        network: On the meta device; changed in place.
        has_new_head: Whether the modules outside the backbone are trained too.
        adapter: Options of the adapters.
        quantization: How the frozen linear layers are stored.
        adapter_dtype: The dtype of adapters and new head.
    """
    network.requires_grad_(False)
    outputs = network.get_output_embeddings()
    for parent in list(network.base_model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or layer is outputs:
                continue
            replacement: nn.Module = layer if quantization == "none" else _Quantized(layer, quantization)
            if adapter.targets == "all-linear" or name in adapter.targets:
                width = (layer.in_features, layer.out_features)
                replacement = _Adapted(replacement, width, adapter, adapter_dtype)
            setattr(parent, name, replacement)
    if has_new_head:
        for module in network.children():
            if module is not network.base_model:
                module.to(adapter_dtype).requires_grad_(True)
