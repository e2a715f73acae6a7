"""Functions over the inner modules of a network, run as the network's own forward."""

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
    """Let a function call modules inside a network that is sharded.

    FSDP gathers what belongs to no block (embeddings, the last norm, the head) where the network's `forward` begins.
    A function that calls its inner modules would find shards there.
    """

    @wraps(function)
    def run(network: "PreTrainedModel", *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        method = getattr(network, NAME, None)
        if method is None:
            return function(network, *arguments, **options)
        try:
            return method(function, *arguments, **options)
        except Exception:
            if hasattr(network, "reset_iter_state"):  # else the next forward believes that this one still runs
                network.reset_iter_state()
            raise

    return run


def register(network: "PreTrainedModel") -> None:
    """Make a sharded network know the functions that run as its forward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def run(self: "PreTrainedModel", function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(self, *arguments, **options)

    setattr(network, NAME, types.MethodType(run, network))
    register_fsdp_forward_method(network, NAME)
