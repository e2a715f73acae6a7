"""Builds a sharded network (PyTorch's FSDP2) without ever having all of it on one rank.

The network is built on the meta device and sharded. Then each rank reads its own part of each tensor. A network from
scratch is built on rank 0, as on one device, and its tensors are sent out one by one. So the same seed gives the same
weights on any number of ranks.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from datamodules.backbones.packaged import backbone_source
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.building import build_network, pretrained_network, refuse_shape
from models.networks.configurations import meta_network, network_config
from models.networks.network_options import NetworkOptions
from models.networks.sharding import fill, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("proactive")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def build_sharded_network(
    options: NetworkOptions,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    mesh: "DeviceMesh",
    device: torch.device,
    precision: str,
) -> "PreTrainedModel":
    """The network of `build_network`, sharded over the ranks of a mesh. All ranks must call this.

    Args:
        options: The network's options.
        tokenizer: As in `build_network`.
        mesh: One dimension to shard over, or two: replicate over the first and shard over the second.
        device: The device of this rank.
        precision: The trainer's precision. With bf16-mixed, ranks compute in bfloat16 and add up gradients in float32.
            With bf16-true, weights are also stored in bfloat16.

    Raises:
        UserError: As in `build_network`, or sharding does not support the precision.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision: {precision} is not supported with sharded weights",
            f"Use {' or '.join(PRECISIONS)}.",
        )
    config = network_config(options, tokenizer)
    network = meta_network(options, config)
    files = None if options.backbone == SCRATCH else WeightFiles.of(network, options)
    new = {} if files is None else _new_modules(network, files)
    shard(network, mesh, precision)
    network.to_empty(device=device)
    network.tie_weights()  # to_empty unties them
    if files is None:
        _send_from_rank_0(network, partial(build_network, options, tokenizer))
    elif files.missing(network, new):
        log.info(
            f"model.backbone: the files of {options.backbone} name tensors in another way; rank 0 loads all of them"
        )
        _send_from_rank_0(network, partial(_load_on_one_rank, options, config))
    else:
        files.read_into(network)
        _initialize(network, new)
    _compute_buffers(network)
    return network


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a backbone.

    Attributes:
        backbone: Hub id or local path.
        files: The file of each tensor, by the tensor's name in the network.
        keys: The tensor's name in the file, by its name in the network.
    """

    backbone: str
    files: dict[str, Path]
    keys: dict[str, str]

    @classmethod
    def of(cls, network: "PreTrainedModel", options: NetworkOptions) -> "WeightFiles":
        """Look up each tensor by its name, with or without the base model's prefix.

        A classifier's head with another number of classes is left out, because it is initialized anew.

        Raises:
            UserError: The backbone has no safetensors files, or a tensor in them has another shape.
        """
        file_of = _file_of_each_tensor(options.backbone)
        prefix = f"{network.base_model_prefix}."
        keys = {}
        for name in network.state_dict():
            for key in (name, name.removeprefix(prefix), prefix + name):
                if key in file_of:
                    keys[name] = key
                    break
        found = cls(options.backbone, {name: file_of[key] for name, key in keys.items()}, keys)
        new_head = found._of_other_shape(network, options)
        return cls(
            options.backbone,
            {name: path for name, path in found.files.items() if name not in new_head},
            {name: key for name, key in keys.items() if name not in new_head},
        )

    def missing(self, network: "PreTrainedModel", new: dict[str, nn.Module]) -> list[str]:
        """The network's tensors that are not in the files, not tied to one that is, and not in a new module."""
        tensors = network.state_dict(keep_vars=True)
        found = {id(tensors[name]) for name in self.keys}
        initialized = tuple(f"{name}." for name in new)
        return [
            name for name, tensor in tensors.items() if id(tensor) not in found and not name.startswith(initialized)
        ]

    def read_into(self, network: "PreTrainedModel") -> None:
        """Read this rank's part of each tensor."""
        tensors = network.state_dict(keep_vars=True)
        with ExitStack() as stack:
            for name, source in self._open(stack):
                fill(tensors[name], source.get_slice(self.keys[name]))

    def _of_other_shape(self, network: "PreTrainedModel", options: NetworkOptions) -> set[str]:
        """The tensors of a classifier's head with another number of classes."""
        tensors, other = network.state_dict(), set()
        with ExitStack() as stack:
            for name, source in self._open(stack):
                shape = source.get_slice(self.keys[name]).get_shape()
                if tuple(shape) != tuple(tensors[name].shape):
                    refuse_shape(network, options, name, shape, tensors[name].shape)
                    other.add(name)
        return other

    def _open(self, stack: ExitStack) -> Iterator[tuple[str, Any]]:
        """Each tensor's name in the network, with its opened file."""
        from safetensors import SafetensorError, safe_open

        opened: dict[Path, Any] = {}
        for name, path in self.files.items():
            if path not in opened:
                try:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise UserError(f"model.backbone: {path}: {error}", "Fetch the backbone's files again.") from error
            yield name, opened[path]


def _file_of_each_tensor(backbone: str) -> dict[str, Path]:
    """The file of each of a backbone's tensors, by the tensor's name in the file."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    source = backbone_source(backbone)
    if index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **optional):
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {name: cached_file(source, name, **optional) for name in sorted(set(names.values()))}
        if missing := [name for name, path in paths.items() if path is None]:
            raise UserError(
                f"model.backbone: {backbone} has no {missing[0]}, which its index names",
                "Fetch the backbone's files again.",
            )
        return {key: Path(paths[name]) for key, name in names.items()}
    if single := cached_file(source, SAFE_WEIGHTS_NAME, **optional):
        with safe_open(single, framework="pt") as source:
            return dict.fromkeys(source.keys(), Path(single))
    raise UserError(
        f"model.backbone: {backbone} has no weights as safetensors",
        "Give a hub id that this machine can reach, or a folder that save_pretrained wrote as safetensors.",
    )


def _new_modules(network: "PreTrainedModel", files: WeightFiles) -> dict[str, nn.Module]:
    """Copies, on the meta device, of the modules outside the base model that the files lack: a new head."""
    inside = {id(module) for module in network.base_model.modules()}
    known = {name.rpartition(".")[0] for name in files.keys}
    in_files = {id(tensor) for name, tensor in network.state_dict(keep_vars=True).items() if name in files.keys}
    new = {}
    for name, module in network.named_modules():
        own = list(module.parameters(recurse=False))
        tied = any(id(parameter) in in_files for parameter in own)
        if own and not tied and id(module) not in inside and name not in known:
            new[name] = copy.deepcopy(module)
    return new


def _initialize(network: "PreTrainedModel", new: dict[str, nn.Module]) -> None:
    """Initialize a new head as transformers does on one device. All ranks draw the same numbers and keep their part."""
    tensors = network.state_dict(keep_vars=True)
    for name, module in new.items():
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        network._init_weights(module)
        for key, parameter in module.named_parameters(recurse=False):
            fill(tensors[f"{name}.{key}"], parameter.detach())


def _load_on_one_rank(options: NetworkOptions, config: "PretrainedConfig") -> "PreTrainedModel":
    """Load a backbone with transformers, which can also rename and join tensors of its files."""
    network, initialized = pretrained_network(options, config)
    prefix = f"{network.base_model_prefix}."
    new_head = set()
    if options.head == "classifier":
        new_head = {name for name, _ in network.named_parameters() if not name.startswith(prefix)}
    if missing := sorted(set(initialized) - new_head):
        raise UserError(
            f"model.backbone: {options.backbone} lacks {len(missing)} of its tensors, the first of them {missing[0]}",
            "Fetch the backbone's files again.",
        )
    return network


def _send_from_rank_0(network: "PreTrainedModel", build: Callable[[], "PreTrainedModel"]) -> None:
    """Build the network on rank 0 and send each other rank its shards, one tensor at a time.

    Raises:
        UserError: Rank 0 cannot build it. The error is raised on all ranks.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state: dict[str, Any] = {}
    problem: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            state = build().state_dict()
        except UserError as error:
            problem = [error]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    set_model_state_dict(
        network, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )


def _compute_buffers(network: "PreTrainedModel") -> None:
    """Compute the buffers that no file contains, as transformers does after loading weights."""
    for tensor in network.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in network.modules():
        module._is_hf_initialized = False
    network.initialize_weights()
