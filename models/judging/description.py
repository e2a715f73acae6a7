"""What agents and judges say of themselves, for the record of what they answered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from datamodules.corpus.traces import Trace

Advance = Callable[[], None]  # counts one more, for progress


def uncounted() -> None:
    """Counts nothing."""


@dataclass(frozen=True)
class Description:
    """An agent or a judge in plain types.

    Attributes:
        settings: All that its answers follow from, but its weights; a log goes on under the same settings only.
        doing: What it does, for a line of progress; None where it is done at once.
        weights: A digest of its weights, if it has any of its own.
        source: Where its weights came from, or the address of its endpoint.
        notes: What else a reader of its answers has to know.
    """

    settings: dict[str, Any]
    doing: str | None = None
    weights: str | None = None
    source: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Described(Protocol):
    """An agent or a judge."""

    def describe(self) -> Description:
        """What it is."""
        ...


Part = TypeVar("Part", bound=Described)


def shares(parts: Mapping[str, Part], traces: Sequence[Trace]) -> list[tuple[Part, list[Trace]]]:
    """Each agent or judge with the traces that are its own."""
    found: dict[int, tuple[Part, list[Trace]]] = {}
    for trace in traces:
        part = parts[trace.name]
        found.setdefault(id(part), (part, []))[1].append(trace)
    return list(found.values())


def joint_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What the answers of all together follow from."""
    described = _descriptions(parts)
    first = next(iter(described.values()))
    weights = {name: one.weights for name, one in described.items()}
    return first.settings | ({"weights": weights} if first.weights else {})


def joint_record(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The same for a person: with addresses, and files in place of digests."""
    described = _descriptions(parts)
    first = next(iter(described.values()))
    if first.weights is None:
        return first.settings | ({"url": first.source} if first.source else {})
    record = first.settings | {"weights": {name: one.source for name, one in described.items()}}
    once = {one.source: one for one in described.values()}
    if "calibration" in first.notes:
        record["calibration"] = {source: one.notes["calibration"] for source, one in once.items()}
        record["truncated_rows"] = sum(one.notes["truncated_rows"] for one in once.values())
    return record


def _descriptions(parts: Mapping[str, Part]) -> dict[str, Description]:
    """By the name of a trace; each agent or judge describes itself once."""
    once = {id(part): part.describe() for part in parts.values()}
    return {name: once[id(part)] for name, part in parts.items()}
