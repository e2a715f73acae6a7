"""Shards of networks and tensors over ranks (PyTorch's FSDP2 and DTensor)."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.networks.forward import register

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import PreTrainedModel


def shard(network: "PreTrainedModel", mesh: "DeviceMesh", precision: str) -> None:
    """Shard a network. FSDP gathers each block when it runs, and all other parameters for the whole forward pass.

    Args:
        network: Changed in place.
        mesh: See `models.networks.distributed_loading.build_sharded_network`.
        precision: The same.
    """
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"mesh": _without_single_replica(mesh), "mp_policy": _policy(precision)}
    for block in blocks(network):
        fully_shard(block, **options)
    fully_shard(network, **options)
    register(network)


def reshard(network: nn.Module) -> None:
    """Free parameters that a forward-only pass left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network.

    These are the modules in its outermost ModuleLists whose modules all have the same class, and weights.
    """
    found: list[nn.Module] = []
    queue: list[nn.Module] = [network]
    while queue:
        module = queue.pop(0)
        children = list(module.children())
        one_class = isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1
        if one_class and all(any(True for _ in child.parameters()) for child in children):
            found += children
        else:
            queue += children
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. If it is sharded, all ranks must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(network: nn.Module) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded network on rank 0's CPU, one after the other. All ranks must call this.

    Returns:
        The state dict; on other ranks it has empty tensors. None if the network is not sharded.
    """
    from torch.distributed.tensor import DTensor

    tensors = network.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return None
    gathered: dict[int, Tensor] = {}  # by identity, so that tied weights remain one tensor
    for tensor in tensors.values():
        if id(tensor) not in gathered:
            full = full_tensor(tensor.detach())
            gathered[id(tensor)] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in tensors.items()}


def shard_of(full: Any, like: Tensor) -> Tensor:
    """This rank's part of a full tensor.

    Args:
        full: A tensor, or a slice of a safetensors file, from which only the part is read.
        like: A tensor that is sharded in the wanted way. If it is not a DTensor, the part is the full tensor.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(like, DTensor):
        return full[:] if like.ndim else torch.as_tensor(full[...])
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself if it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_index(tensor: Tensor) -> int:
    """The flat index, in the full tensor, of this rank's first value. The tensor must be sharded by rows."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(start * stride for start, stride in zip(offset, tensor.stride(), strict=True))


def zeros_as(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros on the device of another tensor, and sharded like it. Both must have the same number of rows."""
    from torch.distributed import tensor as distributed

    if not isinstance(like, distributed.DTensor):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return distributed.zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def fill(target: Tensor, full: Any) -> None:
    """Copy this rank's part of a full tensor, see `shard_of`, into a tensor or its shard."""
    with torch.no_grad():
        part = local_shard(target)
        if part.numel():
            part.copy_(shard_of(full, target))


def _without_single_replica(mesh: "DeviceMesh") -> "DeviceMesh":
    return mesh[mesh.mesh_dim_names[-1]] if mesh.ndim == 2 and mesh.size(0) == 1 else mesh  # type: ignore[index]


def _policy(precision: str) -> "MixedPrecisionPolicy":
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision.startswith("bf16"):
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
