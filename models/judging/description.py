"""Descriptions of agents and judges, for logs and records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from datamodules.corpus.traces import Trace

Advance = Callable[[], None]  # counts one finished item, for progress


def uncounted() -> None:
    """Count nothing."""


@dataclass(frozen=True)
class Description:
    """A description of an agent or a judge, in plain types.

    Attributes:
        settings: Everything except weights that determines its answers. A log only continues with equal settings.
        progress_label: The text before its progress bar; None if it needs none, because it answers at once.
        weights: The digest of its weights, if it has local weights.
        source: The path of its weights, or the address of its endpoint.
        notes: Further entries of the record in metrics.json.
    """

    settings: dict[str, Any]
    progress_label: str | None = None
    weights: str | None = None
    source: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Described(Protocol):
    """An agent or a judge."""

    def describe(self) -> Description:
        """Return its settings and its source."""
        ...


Part = TypeVar("Part", bound=Described)


def group_traces(parts: Mapping[str, Part], traces: Sequence[Trace]) -> list[tuple[Part, list[Trace]]]:
    """Group traces by their agent or judge."""
    found: dict[int, tuple[Part, list[Trace]]] = {}
    for trace in traces:
        part = parts[trace.name]
        found.setdefault(id(part), (part, []))[1].append(trace)
    return list(found.values())


def joint_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The settings of the agents or judges of all traces together, as the first line of a log stores them."""
    described = _descriptions(parts)
    first = next(iter(described.values()))
    weights = {name: one.weights for name, one in described.items()}
    return first.settings | ({"weights": weights} if first.weights else {})


def joint_record(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The same for metrics.json: with addresses, and with the paths of weights instead of their digests."""
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
    """The descriptions by trace name; calls `describe` once for each agent or judge."""
    once = {id(part): part.describe() for part in parts.values()}
    return {name: once[id(part)] for name, part in parts.items()}
