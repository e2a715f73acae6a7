"""The endpoint that a group of options describes, in every command that has such options."""

from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from models.judging.budget import Price
from models.judging.endpoint import Endpoint, EndpointOptions
from proactive.parser import Parser

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_endpoint_options(parser: Parser, role: str, what: str, prompt: Path) -> None:
    """Add the options of a role's endpoint.

    Args:
        parser: The parser of the command.
        role: The name of the group of options.
        what: The help text of the address.
        prompt: The default prompt file.
    """
    add = parser.add_argument
    add(f"--{role}.url", type=str, help=what)
    add(f"--{role}.model", type=str, help="Name of the model at the endpoint.")
    add(f"--{role}.key_variable", type=str, help="Environment variable with the endpoint's key, if it needs one.")
    add(f"--{role}.prompt", type=Path, default=prompt, help="Prompt file of the model; its comments explain it.")
    add(f"--{role}.extra", type=dict, default={}, help="More fields for each request, such as {max_tokens: 512}.")
    add(f"--{role}.structured", type=bool, default=True, help="Also request JSON from the endpoint by response_format.")
    parser.add_class_arguments(Price, f"{role}.price")


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
