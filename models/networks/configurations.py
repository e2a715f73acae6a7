"""Configurations of networks, and networks without weights, or with random ones, from configurations."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from datamodules.backbones.packaged import backbone_source, check_source
from datamodules.backbones.quiet import quiet_transformers
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.network_options import Head, NetworkOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # their first position is padding id + 1
STRETCHED = {"yarn", "linear", "dynamic"}  # types of rotary positions, see `max_positions`
LABELS = {0: "rejected", 1: "accepted"}
# A Llama-type decoder of about 2.2 million parameters, embeddings included.
SCRATCH_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def network_config(options: NetworkOptions, tokenizer: "PreTrainedTokenizerFast") -> "PretrainedConfig":
    """The configuration of the network that `models.networks.building.build_network` builds.

    Args:
        options: The network's options.
        tokenizer: Determines the padding token and, for a backbone from scratch, the size of the vocabulary.

    Raises:
        UserError: The backbone does not exist, is not a text model, or has fewer embeddings than the tokenizer has
            tokens.
    """
    from transformers import AutoConfig

    backbone = options.backbone
    with naming_backbone(options.head, backbone), quiet_transformers():
        if backbone == SCRATCH:
            settings = {"vocab_size": len(tokenizer), **(options.scratch or SCRATCH_CONFIG)}
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        else:
            source = backbone_source(backbone)
            check_source(source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code)
        text = config.get_text_config()
        if not hasattr(text, "vocab_size"):
            raise UserError(f"model.backbone: {backbone} is not a text model", "Give an encoder or decoder of text.")
        if type(text) in auto_class(options.head)._model_mapping:
            config = text  # the text part of a network for text and images
        _set_head_and_tokens(config, options, tokenizer)
        if len(tokenizer) > text.vocab_size:
            raise UserError(
                f"model.backbone: the tokenizer has {len(tokenizer)} tokens, {backbone} has embeddings for "
                f"{text.vocab_size}",
                "Give backbone and tokenizer that belong together.",
            )
    return config


def _set_head_and_tokens(
    config: "PretrainedConfig", options: NetworkOptions, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    if options.head == "classifier":
        config.num_labels = len(LABELS)
        config.id2label = dict(LABELS)
        config.label2id = {label: index for index, label in LABELS.items()}
        config.problem_type = "single_label_classification"
    else:
        config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if options.dropout is not None:
        for name, value in config.to_dict().items():
            if isinstance(value, (int, float)) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, options.dropout)


def max_positions(config: "PretrainedConfig") -> int:
    """The number of tokens for which a backbone has positions, or on which its rotary positions were trained.

    Rotary positions with a YaRN, linear or dynamic factor reach `factor` times as far as in pretraining. The length
    in pretraining is `original_max_position_embeddings` or, without that, `max_position_embeddings`.
    """
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in STRETCHED:
        original = rotary.get("original_max_position_embeddings") or positions
        positions = max(positions, int(original * (rotary.get("factor") or 1)))
    if config.model_type in POSITIONS_AFTER_PADDING:
        return positions - config.pad_token_id - 1
    return positions


def meta_network(options: NetworkOptions, config: "PretrainedConfig") -> "PreTrainedModel":
    """The network of a configuration on the meta device, without weights."""
    more = {"trust_remote_code": True} if options.trust_remote_code else {}
    with naming_backbone(options.head, options.backbone), quiet_transformers(), torch.device("meta"):
        return auto_class(options.head).from_config(config, **options.for_transformers, **more)


def network_from_config(options: NetworkOptions, config: dict[str, Any]) -> "PreTrainedModel":
    """The network of a stored configuration, with random weights that the caller replaces.

    Args:
        options: Only head, dtype and attn_implementation are used.
        config: As a checkpoint or config.json contains it.
    """
    from transformers import AutoConfig

    with naming_backbone(options.head, config["model_type"]), quiet_transformers():
        return auto_class(options.head).from_config(AutoConfig.for_model(**config), **options.for_transformers)


def refuse_other_size(head: Head, config: dict[str, Any], tensors: int, weights: int, adapter: bool = False) -> None:
    """Refuse a configuration of a far larger network than the file has weights, before memory is allocated.

    Args:
        head: The network's head.
        config: The configuration, as a file contains it.
        tensors: Number of tensors in the file.
        weights: Number of values in all of them.
        adapter: Whether the file contains only adapters. Each layer has at least one.

    Raises:
        UserError: The configuration describes a far larger network, or no network.
    """
    from transformers import AutoConfig

    with naming_backbone(head, config["model_type"]), quiet_transformers():
        described = AutoConfig.for_model(**config)
        layers = int(getattr(described.get_text_config(), "num_hidden_layers", 0))
    larger = f"{layers:,} layers" if layers > tensors else ""
    if not larger and not adapter:
        network = meta_network(NetworkOptions(head, config["model_type"]), described)
        needed = sum(parameter.numel() for parameter in network.parameters())
        if needed > 2 * weights:
            larger = f"{needed:,} weights"
    if larger:
        raise UserError(
            f"the configuration describes {larger}, but the file contains {tensors:,} tensors of {weights:,} weights",
            "Give weights and configuration that belong together.",
        )


def refuse_unfit_tokenizer(network: "PreTrainedModel | None", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a tokenizer with more tokens than a network has embeddings.

    Raises:
        UserError: The tokenizer has more tokens.
    """
    assert network is not None, "a loaded model has weights"
    embeddings = network.config.get_text_config().vocab_size
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the network has embeddings for {embeddings}",
            "Give backbone and tokenizer that belong together.",
        )


def auto_class(head: Head) -> Any:
    """The class of transformers that builds networks with a head."""
    import transformers

    classes = {"classifier": "AutoModelForSequenceClassification", "language model": "AutoModelForCausalLM"}
    return getattr(transformers, classes[head])


@contextlib.contextmanager
def naming_backbone(head: Head, name: str) -> Iterator[None]:
    """Turn any error of transformers into a UserError that names the backbone."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # foreign or damaged files make transformers raise errors of any type
        raise UserError(
            f"model.backbone: cannot make a {head} of {name}: {error_text(error, 300)}",
            "Give a hub id that this machine can reach, or a folder that save_pretrained wrote as safetensors.",
        ) from error
