"""A network whose weights are spread over ranks (PyTorch's FSDP2): made without ever being whole on one of them.

It is built on the meta device and cut into shards; then each rank reads its own part of each tensor. A network from
scratch is made on rank 0 as on one device, and its tensors are sent out one by one: so the same seed gives the same
weights on any number of ranks.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.backbone import (
    DtypeName,
    Head,
    build_network,
    network_config,
    pretrained_network,
    refuse_shape,
    weightless_network,
)
from models.networks.forward import register

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("proactive")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def build_sharded_network(
    head: Head,
    backbone: str,
    tokenizer: "PreTrainedTokenizerFast",
    scratch: dict[str, Any] | None = None,
    *,
    mesh: "DeviceMesh",
    device: torch.device,
    precision: str,
    dtype: DtypeName = "float32",
    attn_implementation: str | None = None,
    dropout: float | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The network that `build_network` makes, spread over the ranks of a mesh.

    Args:
        head, backbone, tokenizer, scratch, dtype, attn_implementation, dropout, trust_remote_code: As there.
        mesh: One dimension to shard over, or two, to shard over the second and replicate over the first.
        device: This rank's.
        precision: The trainer's. With bf16-mixed, ranks compute in bfloat16 and add gradients up in float32; with
            bf16-true, weights are stored in bfloat16 as well.

    Raises:
        UserError: As there, or the backbone's files lack a tensor, or have one of another shape.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision: {precision} does not serve where weights are sharded",
            f"Use {' or '.join(PRECISIONS)}.",
        )
    config = network_config(head, backbone, tokenizer, scratch, dropout=dropout, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    network = weightless_network(head, backbone, config, **options)
    files = None if backbone == SCRATCH else WeightFiles.of(network, head, backbone)
    new = {} if files is None else _new_modules(network, files)
    shard(network, mesh, precision)
    network.to_empty(device=device)
    network.tie_weights()  # which to_empty undoes
    if files is None:
        _send_out(network, partial(build_network, head, backbone, tokenizer, scratch, dropout=dropout, **options))
    elif files.lacks(network, new):
        log.info(f"model.backbone: the files of {backbone} name tensors otherwise; rank 0 loads them whole")
        _send_out(network, partial(_load_whole, head, backbone, config, **options))
    else:
        files.read_into(network)
        _draw(network, new)
    _compute_buffers(network)
    return network


def shard(network: "PreTrainedModel", mesh: "DeviceMesh", precision: str) -> None:
    """Spread a network's weights: each block is gathered when its turn comes, all else for the whole forward."""
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"mesh": _without_single_replica(mesh), "mp_policy": _policy(precision)}
    for block in blocks(network):
        fully_shard(block, **options)
    fully_shard(network, **options)
    register(network)


def reshard(network: nn.Module) -> None:
    """Leave shards alone in place of what a forward without a backward gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network: the modules of its outermost lists of modules of one kind that have weights."""
    found: list[nn.Module] = []
    waiting: list[nn.Module] = [network]
    while waiting:
        module = waiting.pop(0)
        children = list(module.children())
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1
        if alike and all(any(True for _ in child.parameters()) for child in children):
            found += children
        else:
            waiting += children
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is spread over ranks, each of them has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(network: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a sharded network on rank 0's host, one gathered after the other; None if it is whole anyway.

    All ranks have to ask.
    """
    from torch.distributed.tensor import DTensor

    tensors = network.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return None
    gathered: dict[int, Tensor] = {}  # by identity, so that tied weights stay one
    for tensor in tensors.values():
        if id(tensor) not in gathered:
            full = whole(tensor.detach())
            gathered[id(tensor)] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in tensors.items()}


def shard_of(whole: Any, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut as `like` is.

    Args:
        whole: All of it: a tensor, or a slice of a safetensors file, of which the part alone is read.
        like: A DTensor; of any other tensor the part is all.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(like, DTensor):
        return whole[:] if like.ndim else torch.as_tensor(whole[...])
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of one that is not spread over ranks."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_place(tensor: Tensor) -> int:
    """Where in the whole, row after row, the part of this rank begins; for parts that are rows."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(start * stride for start, stride in zip(offset, tensor.stride(), strict=True))


def zeros_as(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of a shape, spread over ranks as another tensor is, with as many rows."""
    from torch.distributed import tensor as distributed

    if not isinstance(like, distributed.DTensor):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return distributed.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def fill(target: Tensor, whole: Any) -> None:
    """Put this rank's part of a whole tensor into its shard."""
    with torch.no_grad():
        part = local(target)
        if part.numel():
            part.copy_(shard_of(whole, target))


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a backbone.

    Attributes:
        files: Where each tensor of the network lies, by the network's name for it.
        keys: The name that it has there.
    """

    backbone: str
    files: dict[str, Path]
    keys: dict[str, str]

    @classmethod
    def of(cls, network: "PreTrainedModel", head: Head, backbone: str) -> "WeightFiles":
        """Look for each tensor under its own name, and under that with or without the base model's prefix.

        Raises:
            UserError: The backbone has no safetensors files, or a tensor in them has another shape. A classifier's
                head of another number of classes is left out instead, to be made anew.
        """
        place = _places(backbone)
        prefix = f"{network.base_model_prefix}."
        keys = {}
        for name in network.state_dict():
            for key in (name, name.removeprefix(prefix), prefix + name):
                if key in place:
                    keys[name] = key
                    break
        found = cls(backbone, {name: place[key] for name, key in keys.items()}, keys)
        other = found._of_another_shape(network, head)
        return cls(
            backbone,
            {name: path for name, path in found.files.items() if name not in other},
            {name: key for name, key in keys.items() if name not in other},
        )

    def lacks(self, network: "PreTrainedModel", new: dict[str, nn.Module]) -> list[str]:
        """The tensors that are neither here, nor tied to one that is, nor made anew."""
        tensors = network.state_dict(keep_vars=True)
        here = {id(tensors[name]) for name in self.keys}
        made = tuple(f"{name}." for name in new)
        return [name for name, tensor in tensors.items() if id(tensor) not in here and not name.startswith(made)]

    def read_into(self, network: "PreTrainedModel") -> None:
        """Read this rank's part of each tensor."""
        tensors = network.state_dict(keep_vars=True)
        with ExitStack() as stack:
            for name, source in self._opened(stack):
                fill(tensors[name], source.get_slice(self.keys[name]))

    def _of_another_shape(self, network: "PreTrainedModel", head: Head) -> set[str]:
        """The tensors of a head of another number of classes, which is made anew."""
        tensors, other = network.state_dict(), set()
        with ExitStack() as stack:
            for name, source in self._opened(stack):
                shape = source.get_slice(self.keys[name]).get_shape()
                if tuple(shape) != tuple(tensors[name].shape):
                    refuse_shape(network, head, self.backbone, name, shape, tensors[name].shape)
                    other.add(name)
        return other

    def _opened(self, stack: ExitStack) -> Iterator[tuple[str, Any]]:
        from safetensors import SafetensorError, safe_open

        opened: dict[Path, Any] = {}
        for name, path in self.files.items():
            if path not in opened:
                try:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise UserError(f"model.backbone: {path}: {error}", "Fetch the backbone's files again.") from error
            yield name, opened[path]


def _places(backbone: str) -> dict[str, Path]:
    """In which file each tensor of a backbone lies."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(backbone, SAFE_WEIGHTS_INDEX_NAME, **optional):
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {name: cached_file(backbone, name, **optional) for name in sorted(set(names.values()))}
        if missing := [name for name, path in paths.items() if path is None]:
            raise UserError(
                f"model.backbone: {backbone} has no {missing[0]}, which its index names",
                "Fetch the backbone's files again.",
            )
        return {key: Path(paths[name]) for key, name in names.items()}
    if single := cached_file(backbone, SAFE_WEIGHTS_NAME, **optional):
        with safe_open(single, framework="pt") as source:
            return dict.fromkeys(source.keys(), Path(single))
    raise UserError(
        f"model.backbone: {backbone} has no weights as safetensors",
        "Give a hub id that this machine can reach, or a folder that save_pretrained wrote as safetensors.",
    )


def _new_modules(network: "PreTrainedModel", files: WeightFiles) -> dict[str, nn.Module]:
    """Copies, without weights, of the modules outside the base model that the files know nothing of: a new head."""
    inside = {id(module) for module in network.base_model.modules()}
    known = {name.rpartition(".")[0] for name in files.keys}
    tied = {id(files_tensor) for name, files_tensor in network.state_dict(keep_vars=True).items() if name in files.keys}
    return {
        name: copy.deepcopy(module)
        for name, module in network.named_modules()
        if id(module) not in inside
        and name not in known
        and (own := list(module.parameters(recurse=False)))
        and not any(id(parameter) in tied for parameter in own)
    }


def _draw(network: "PreTrainedModel", new: dict[str, nn.Module]) -> None:
    """Draw a new head's weights as transformers does on one device; all ranks draw alike and keep their parts."""
    tensors = network.state_dict(keep_vars=True)
    for name, module in new.items():
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        network._init_weights(module)
        for key, parameter in module.named_parameters(recurse=False):
            fill(tensors[f"{name}.{key}"], parameter.detach())


def _load_whole(
    head: Head, backbone: str, config: "PretrainedConfig", *, dtype: DtypeName, **options: Any
) -> "PreTrainedModel":
    """What transformers makes of a backbone's files, which it can also rename and join."""
    network, drawn = pretrained_network(head, backbone, config, dtype=getattr(torch, dtype), **options)
    new = [] if head == "language model" else [n for n, _ in network.named_parameters() if not _in_base(network, n)]
    if missing := sorted(set(drawn) - set(new)):
        raise UserError(
            f"model.backbone: {backbone} lacks {len(missing)} of its tensors, the first of them {missing[0]}",
            "Fetch the backbone's files again.",
        )
    return network


def _in_base(network: "PreTrainedModel", name: str) -> bool:
    return name.startswith(f"{network.base_model_prefix}.")


def _send_out(network: "PreTrainedModel", build_whole: partial["PreTrainedModel"]) -> None:
    """Make the whole network on rank 0 and send each other rank its shards, one tensor at a time."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = {}
    problem: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            whole = build_whole().state_dict()
        except UserError as error:
            problem = [error]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    set_model_state_dict(
        network, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )


def _compute_buffers(network: "PreTrainedModel") -> None:
    """Compute the buffers that are in no file, as transformers does after it has loaded weights."""
    for tensor in network.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in network.modules():
        module._is_hf_initialized = False
    network.initialize_weights()


def _without_single_replica(mesh: "DeviceMesh") -> "DeviceMesh":
    return mesh[mesh.mesh_dim_names[-1]] if mesh.ndim == 2 and mesh.size(0) == 1 else mesh  # type: ignore[index]


def _policy(precision: str) -> "MixedPrecisionPolicy":
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision.startswith("bf16"):
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
