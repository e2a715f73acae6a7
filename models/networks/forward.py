"""A decorator for functions that call modules inside a network. It runs them as the network's own forward."""

import types
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
NAME = "run_as_forward"


def as_forward(
    function: Callable[Concatenate["PreTrainedModel", Parameters], Result],
) -> Callable[Concatenate["PreTrainedModel", Parameters], Result]:
    """Decorate a function that calls modules inside a network, so that it also works for a sharded network.

    FSDP gathers the parameters outside the blocks (embeddings, last norm, head) when the network's `forward` begins.
    Without this decorator, the modules would compute with their shards.
    """

    @wraps(function)
    def run(network: "PreTrainedModel", *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        method = getattr(network, NAME, None)
        if method is None:
            return function(network, *arguments, **options)
        try:
            return method(function, *arguments, **options)
        except Exception:
            if hasattr(network, "reset_iter_state"):  # FSDP would take the next forward for a part of this one
                network.reset_iter_state()
            raise

    return run


def register(network: "PreTrainedModel") -> None:
    """Prepare a sharded network for functions with `as_forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def run(self: "PreTrainedModel", function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(self, *arguments, **options)

    setattr(network, NAME, types.MethodType(run, network))
    register_fsdp_forward_method(network, NAME)
