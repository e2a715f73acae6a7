"""What a person runs: one module for each command."""

import sys
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from proactive.environment import refuse_impossible_place

try:
    refuse_impossible_place()  # before Lightning is imported, which would end in a traceback
except UserError as mistake:
    print(f"error: {mistake.what}\n  help: {mistake.hint}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from proactive.loading import load_agent, load_judge

__all__ = ["load_agent", "load_judge"]


def __getattr__(name: str) -> Any:
    """Import what loads models when it is asked for: it takes seconds."""
    if name in __all__:
        from proactive import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
