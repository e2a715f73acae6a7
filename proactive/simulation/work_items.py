"""Work items: the sessions to simulate, or the scenes to write. Each succeeds or fails on its own."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

RoleName = Literal["environment", "user", "assistant", "judge", "writer"]
ROLE_NAMES: tuple[RoleName, ...] = ("environment", "user", "assistant", "judge")  # those of a session


@dataclass(frozen=True)
class WorkItem(ABC):
    """One session to simulate, or one scene to write.

    Attributes:
        name: Identifies the item within its simulation.
        seed: Hexadecimal digest of the simulation's seed, the name and the content. So it does not depend on the order
            of items.
    """

    name: str
    seed: str

    @abstractmethod
    def facts_for(self, role: RoleName) -> dict[str, Any]:
        """Return what a role knows in every question about this item, in plain types."""

    def random(self, *purpose: Any) -> Random:
        """Return a random number generator for one purpose. Its numbers do not depend on those for other purposes."""
        return Random(json.dumps([self.seed, *purpose]))


def digest(content: Any) -> str:
    """Return the hexadecimal SHA-256 digest of plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
