"""The endpoint that a group of options describes, in every command that has such options."""

from typing import TYPE_CHECKING

from datamodules.errors import UserError
from models.judging.budget import Price
from models.judging.endpoint import Endpoint, EndpointOptions

if TYPE_CHECKING:
    from jsonargparse import Namespace


def endpoint_of(role: str, options: "Namespace", temperature: float, deadline: float | None = None) -> Endpoint:
    """Return the endpoint of a role.

    Args:
        role: The name of its group of options.
        options: All options of the command, with `seed` and the group `endpoint`.
        temperature: Sampling temperature.
        deadline: When to stop, in the time of `time.monotonic`; never if None.

    Raises:
        UserError: The model has no name, or the address or the key does not fit.
    """
    group = options[role]
    if not group.model:
        raise UserError(f"--{role}.model: an endpoint needs the model's name", f"Give it with --{role}.model.")
    return Endpoint(
        group.url,
        group.model,
        group.key_variable,
        temperature,
        options.seed,
        dict(group.extra),
        group.structured,
        Price(**group.price.as_dict()),
        EndpointOptions(**options.endpoint.as_dict()),
        deadline,
    )
