"""Networks with weights: pretrained, from scratch, or from files that `save_pretrained` wrote."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from datamodules.backbones.packaged import PACKAGED, backbone_source
from datamodules.backbones.quiet import quiet_transformers
from datamodules.corpus.json_records import read_json
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.configurations import (
    LABELS,
    auto_class,
    naming_backbone,
    network_config,
    network_from_config,
    refuse_other_size,
)
from models.networks.network_options import Head, NetworkOptions
from models.networks.weight_files import (
    Configuration,
    naming_file,
    refuse_names,
    refuse_not_finite,
    refuse_other_shape,
    safetensors_files,
    weights_in,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Files of a network for text and images name the tensors of its text part so; the values are the names in the text
# part alone, with its prefix for {}.
TEXT_PART = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "{}.",
}
log = logging.getLogger("proactive")


def build_network(options: NetworkOptions, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """A sequence classifier with two classes, or a causal language model, of transformers.

    Args:
        options: The network's options.
        tokenizer: Determines the padding token and, for a backbone from scratch, the size of the vocabulary.

    Raises:
        UserError: The backbone does not exist, cannot have the head, or does not fit the tokenizer.
    """
    config = network_config(options, tokenizer)
    if options.backbone == SCRATCH:
        with naming_backbone(options.head, SCRATCH), quiet_transformers():
            return auto_class(options.head).from_config(config, **options.for_transformers)
    return pretrained_network(options, config)[0]


def pretrained_network(options: NetworkOptions, config: "PretrainedConfig") -> tuple["PreTrainedModel", list[str]]:
    """A network with pretrained weights, and the names of its tensors that were initialized at random.

    Those are the tensors that the files lack, and a classifier's head if the files' head has another number of
    classes.

    Raises:
        UserError: The files do not fit the configuration, or lack a part of the layers.
    """
    from transformers import PretrainedConfig
    from transformers.utils import SAFE_WEIGHTS_NAME

    head, backbone = options.head, options.backbone
    with naming_backbone(head, backbone), quiet_transformers():
        source = backbone_source(backbone)
        if Path(source).is_dir():
            safetensors_files(Path(source), SAFE_WEIGHTS_NAME)
        is_text_part = PretrainedConfig.get_config_dict(source)[0].get("model_type") != config.model_type
        key_mapping = None
        if is_text_part:
            prefix = auto_class(head)._model_mapping[type(config)].base_model_prefix
            key_mapping = {pattern: name.format(prefix) for pattern, name in TEXT_PART.items()}
        network, found = auto_class(head).from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # checked below
            key_mapping=key_mapping,
            output_loading_info=True,
            trust_remote_code=options.trust_remote_code,
            **options.for_transformers,
        )
        if is_text_part:
            vars(network).pop("_weight_conversions", None)  # else it is saved under the names of the whole network
        new = sorted(found["missing_keys"])
        if gaps := [name for name in new if _must_be_pretrained(network, head, name)]:
            if head == "language model" and any("Classification" in one for one in config.architectures or ()):
                raise UserError(
                    f"model.backbone: {backbone} is a classifier, not a language model",
                    "Give the export of an agent, or a pretrained language model.",
                )
            raise UserError(
                f"model.backbone: {backbone} lacks {len(gaps)} of its tensors, the first of them {gaps[0]}",
                "Fetch the backbone's files again, or give one whose files transformers can read.",
            )
        if more := [name for name in sorted(found["unexpected_keys"]) if _is_of_further_layer(network, name)]:
            raise UserError(
                f"model.backbone: {backbone} contains {len(more)} tensors of layers that its config.json does not "
                f"have, the first of them {more[0]}",
                "Give weights and config.json that belong together.",
            )
        for name, found_shape, own_shape in sorted(found["mismatched_keys"]):
            refuse_shape(network, options, name, found_shape, own_shape)
            new.append(name)
        with naming_file(f"model.backbone: {backbone}"):
            refuse_not_finite((n, weight) for n, weight in network.state_dict().items() if n not in new)
    return network, sorted(new)


def _must_be_pretrained(network: "PreTrainedModel", head: Head, name: str) -> bool:
    """Whether a tensor must be in the files: all tensors except those of a classifier's head and its pooling."""
    layers = [module for module in network.base_model.modules() if isinstance(module, nn.ModuleList)]
    pretrained = [*layers, network.get_input_embeddings()]
    owner = network.get_submodule(name.rpartition(".")[0])
    return head == "language model" or any(owner is module for part in pretrained for module in part.modules())


def _is_of_further_layer(network: "PreTrainedModel", name: str) -> bool:
    """Whether a tensor's name has the index of a layer beyond the network's last one."""
    for prefix, module in network.named_modules():
        for layers in (prefix, prefix.removeprefix(f"{network.base_model_prefix}.")):
            if isinstance(module, nn.ModuleList) and name.startswith(f"{layers}."):
                index = name.removeprefix(f"{layers}.").partition(".")[0]
                if index.isdecimal() and int(index) >= len(module):
                    return True
    return False


def refuse_shape(
    network: "PreTrainedModel", options: NetworkOptions, name: str, found: Sequence[int], own: Sequence[int]
) -> None:
    """Handle a tensor of another shape than the network's: log that a classifier's head is new, refuse all others.

    Args:
        network: The network.
        options: Its options.
        name: The tensor's name.
        found: Its shape in the files.
        own: Its shape in the network.

    Raises:
        UserError: The tensor is not part of a classifier's head.
    """
    inside = {id(module) for module in network.base_model.modules()}
    if options.head == "language model" or id(network.get_submodule(name.rpartition(".")[0])) in inside:
        raise UserError(
            f"model.backbone: {options.backbone}: {name} has the shape {tuple(found)}, not {tuple(own)}",
            "Give weights and config.json that belong together.",
        )
    log.info(
        f"model.backbone: {name} of {options.backbone} has the shape {tuple(found)}, not {tuple(own)}: "
        f"the head is a new one, of {len(LABELS)} classes"
    )


def base_from_config(options: NetworkOptions, config: dict[str, Any]) -> "PreTrainedModel":
    """The base of an adapter: the backbone that the options name, with a new head.

    Args:
        options: The options of the adapter's run.
        config: The configuration that the adapter's checkpoint or export contains.

    Raises:
        UserError: The backbone does not exist any more.
    """
    from transformers import AutoConfig

    if options.backbone == SCRATCH:
        with fixed_seed():
            return network_from_config(options, config)
    safe = replace(options, trust_remote_code=False)  # the options come from a file
    try:
        return pretrained_network(safe, AutoConfig.for_model(**config))[0]
    except UserError as error:
        way = error.hint if options.backbone in PACKAGED else f"Put {options.backbone} back where it was"
        raise UserError(
            f"only the weights of an adapter are stored, and its base is missing: {error.what}",
            f"{way}, or use an export with model.adapter.merge true.",
        ) from error


@contextlib.contextmanager
def fixed_seed() -> Iterator[None]:
    """Initialize weights on the CPU from seed 0.

    An adapter is stored without its base. So a base from scratch must be the same whenever it is built again.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def load_network(head: Head, path: str, *, attn_implementation: str | None = None) -> "PreTrainedModel":
    """A network as `save_pretrained` wrote it.

    Raises:
        UserError: The folder's tensors are not exactly those of its config.json.
    """
    from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_NAME

    folder = Path(path)
    _, config = read_json(folder / CONFIG_NAME, Configuration)
    with naming_file(folder):
        refuse_other_size(head, config, *weights_in(safetensors_files(folder, SAFE_WEIGHTS_NAME)))
        if (folder / ADAPTER_CONFIG_NAME).exists():  # transformers would load the backbone that it names
            raise UserError(f"{ADAPTER_CONFIG_NAME} does not belong in an export of a whole model", "Remove it.")
    with naming_backbone(head, str(folder)), quiet_transformers():
        network, found = auto_class(head).from_pretrained(
            str(folder),
            use_safetensors=True,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # checked below
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    with naming_file(folder):
        refuse_names(found["missing_keys"], found["unexpected_keys"])
        for name, found_shape, own_shape in sorted(found["mismatched_keys"]):
            refuse_other_shape(name, found_shape, own_shape)
        refuse_not_finite(network.state_dict().items())
    return network
