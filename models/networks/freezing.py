"""Keeps the lowest layers of a pretrained network as they are, so that no gradients are computed in and below them."""

from typing import TYPE_CHECKING

from torch import nn

from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.sharding import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_unfit_freezing(count: int, backbone: str, *, has_adapter: bool) -> None:
    """Refuse frozen layers that do not fit other options.

    Args:
        count: The number of frozen layers, model.freeze_layers.
        backbone: The option model.backbone.
        has_adapter: Whether adapters are trained instead of layers.

    Raises:
        UserError: They do not fit.
    """
    if not count:
        return
    if has_adapter:
        raise UserError(
            "model.freeze_layers: with model.adapter all layers are frozen already", "Use one of the two options."
        )
    if backbone == SCRATCH:
        raise UserError(
            "model.freeze_layers: the layers of a backbone from scratch are random, and would stay so",
            "Leave it out, or give a pretrained model.backbone.",
        )


def freeze_lowest(network: "PreTrainedModel", count: int) -> None:
    """Freeze the embeddings and the lowest layers of a network.

    Args:
        network: Changed in place. It may be on the meta device.
        count: The number of layers, at least 0.

    Raises:
        UserError: The network has fewer layers.
    """
    layers = blocks(network.base_model)
    if count > len(layers):
        raise UserError(
            f"model.freeze_layers: {count}, but {type(network).__name__} has {len(layers)} layers",
            f"Use at most {len(layers)}.",
        )
    for module in [*_embeddings(network), *layers[:count]]:
        module.requires_grad_(False)


def lowest_frozen(network: "PreTrainedModel") -> list[nn.Module]:
    """The layers that no gradient reaches: the lowest ones in which, and below which, nothing is trained."""
    found: list[nn.Module] = []
    if any(_is_trained(module) for module in _embeddings(network)):
        return found
    for layer in blocks(network.base_model):
        if _is_trained(layer):
            break
        found.append(layer)
    return found


def _embeddings(network: "PreTrainedModel") -> list[nn.Module]:
    """The modules below the layers: those that contain the token embeddings but no layer, and other embeddings."""
    layers, tokens = set(blocks(network.base_model)), network.get_input_embeddings()
    inside = {module for layer in layers for module in layer.modules()}
    found = []
    for module in network.base_model.modules():
        parts = set(module.modules())
        if not parts & inside and (tokens in parts or isinstance(module, nn.Embedding)):
            found.append(module)
    return found


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
