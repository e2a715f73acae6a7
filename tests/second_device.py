"""A second device for machines that have only a CPU: device type `second`, with real values and strict checks.

Its tensors hold a CPU tensor, and each operation runs on that. As on a GPU, an operation that mixes tensors of two
devices fails (except copies, and scalars, which every device takes from the CPU). `waits` lists operations that a GPU
could not answer before it has run everything queued: copies to the CPU, and results whose value or size Python needs.

Registering it changes the process (PyTorch then has an accelerator), so call `register` in a process of its own.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
KEY = "PrivateUse1"  # PyTorch's dispatch key for devices from other packages
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.allclose.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.where.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MIXED = {aten.copy_.default, aten._to_copy.default, *INDEXING}  # take tensors of two devices; indices may be on a CPU
waits: list[str] = []  # each with the line of this project that asked
_missing: set[torch.dtype] = set()  # types of tensors that cannot be created on the device
_libraries: list[torch.library.Library] = []  # as long as it lives, its operations are registered


class SecondTensor(Tensor):
    """A tensor on the second device. `held` has its values, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "SecondTensor":
        if held.dtype in _missing:
            raise TypeError(f"{device()} has no {held.dtype}")
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device(),
        )
        found.held = held
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SecondTensor({self.held})"

    def tolist(self) -> Any:
        waits.append(f"tolist {_caller()}")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()  # exports find tied weights by their address

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # a file holds plain tensors

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Backend(_DummyBackendModule):
    """What PyTorch asks of a device besides operations."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.get_rng_state()  # operations draw from the CPU's generator

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        torch.set_rng_state(state)


class SecondAccelerator(CPUAccelerator):
    """Lets a trainer run on the second device: `Trainer(accelerator="second", strategy="second")`."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be set up."""

    @staticmethod
    def name() -> str:
        return NAME


def device() -> torch.device:
    return torch.device(NAME, 0)


def lacks_float64() -> None:
    """From now on no float64 tensor can be created there, as on an Apple GPU."""
    _missing.add(torch.float64)


def register() -> None:
    """Make the device known to PyTorch, with every operation that creates a tensor."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    AcceleratorRegistry.register(NAME, SecondAccelerator)
    StrategyRegistry.register(NAME, SingleDeviceStrategy, device=device())
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for schema in torch._C._jit_get_all_schemas():
        names = {argument.name for argument in schema.arguments}
        takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
        if schema.name.startswith("aten::") and "device" in names and not takes_tensors:
            packet = getattr(aten, schema.name.removeprefix("aten::"))
            operation = getattr(packet, schema.overload_name or "default")
            library.impl(operation, lambda *args, operation=operation, **kwargs: _run(operation, args, kwargs), KEY)
    library.impl(aten._copy_from.default, _copy_from, KEY)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `copy_` calls if one of its tensors is on another device."""
    return _run(aten.copy_.default, (target, source), {})


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on what its tensors hold."""
    leaves: list[Any] = []
    held_args, held_kwargs = (_mapped(lambda one: _held(one, leaves), one) for one in (args, dict(kwargs)))
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    others = [one for one in tensors if not isinstance(one, SecondTensor) and one.dim()]
    if others and function not in MIXED:
        raise RuntimeError(f"{function}: a tensor {tuple(others[0].shape)} on {others[0].device}, not on {device()}")
    targets = [one for one in leaves if isinstance(one, torch.device)]
    copies = function is aten.copy_.default
    to_cpu = not isinstance(args[0], SecondTensor) if copies else tensors and any(t.type == "cpu" for t in targets)
    masks = function in INDEXING and any(one.dtype == torch.bool for one in args[1] if one is not None)
    if function in READS or to_cpu or masks:
        waits.append(f"{function} {_caller()}")
    found = function(*held_args, **held_kwargs)
    if to_cpu:
        return args[0] if copies else found
    known = {id(one.held): one for one in tensors if isinstance(one, SecondTensor)}  # in-place results are arguments

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return known[id(one)] if id(one) in known else SecondTensor(one)

    # In inference mode, a view of a tensor from outside it is none of inference mode.
    with torch.inference_mode(torch.is_inference_mode_enabled() and not _views_normal_tensor(function, args)):
        return _mapped(wrapped, found)


def _views_normal_tensor(function: Any, args: Sequence[Any]) -> bool:
    return bool(function.is_view) and not args[0].is_inference()


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Call a function on each leaf of lists, tuples and dicts. PyTorch's pytrees do more and take longer."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, one) for one in value])
    if isinstance(value, dict):
        return {name: _mapped(function, one) for name, one in value.items()}
    return function(value)


def _held(one: Any, leaves: list[Any]) -> Any:
    """What the CPU is given in place of a leaf, which is added to `leaves`."""
    leaves.append(one)
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.held if isinstance(one, SecondTensor) else one


def _caller() -> str:
    """The last line of this project on the stack."""
    lines = [
        frame
        for frame in traceback.extract_stack()
        if any(f"/{package}/" in frame.filename for package in ("models", "datamodules", "callbacks", "proactive"))
        and "site-packages" not in frame.filename
    ]
    return f"{lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else "outside of this project"
