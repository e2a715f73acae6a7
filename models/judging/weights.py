"""Loaded weights, their training data, and the choice of weights for a trace."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from datamodules.corpus.traces import Trace, was_seen
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_trained
from models.learning.training import BackboneModule

Model = TypeVar("Model", bound=BackboneModule)
Made = TypeVar("Made")


class Exposure(IntEnum):
    """Which use the training of some weights made of a trace, from none to the strongest."""

    NONE = 0
    UNKNOWN = 1  # not trained on it; whether validated is unknown, because an old checkpoint does not list these rows
    VALIDATED = 2  # used to choose the best weights and to calibrate them
    TRAINED = 3


@dataclass(frozen=True)
class Weights(Generic[Model]):
    """A loaded model, the saved state of its data module, and the path that it was loaded from."""

    model: Model
    state: dict[str, Any]
    source: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, hexadecimal: equal weights have equal digests."""
        assert self.model.network is not None, "a loaded model has weights"
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def exposure(self, trace: Trace, root_trace: Trace | None) -> Exposure:
        """Return whether training or validation rows contain the trace's session."""
        if self._contains("training", trace, root_trace):
            return Exposure.TRAINED
        if "validation_histories" not in self.state:
            return Exposure.UNKNOWN
        return Exposure.VALIDATED if self._contains("validation", trace, root_trace) else Exposure.NONE

    def _contains(self, rows: str, trace: Trace, root_trace: Trace | None) -> bool:
        scenes, histories = self.state.get(f"{rows}_scenes"), self.state[f"{rows}_histories"]
        return was_seen(trace, root_trace, None if scenes is None else set(scenes), set(histories))


def load_weights(kinds: Sequence[type[Model]], path: Path, option: str) -> Weights[Model]:
    """Load the weights that an option names; see `models.learning.checkpoint_files.load_trained`."""
    model, state, source = load_trained(kinds, path, option)
    return Weights(model, state, str(source))


def best_device() -> torch.device:
    """The device for inference: a GPU if there is one."""
    # With its index, because the device of a tensor on it has one, and cuda does not equal cuda:0.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def assign(
    candidates: Sequence[Weights[Model]],
    traces: Sequence[Trace],
    root_traces_by_name: Mapping[str, Trace],
    option: str,
    contaminated: bool = False,
    but_not: Mapping[str, str] | None = None,
) -> tuple[dict[str, Weights[Model]], dict[str, Exposure]]:
    """Assign weights to each trace: the first of those that are exposed to it least.

    Args:
        candidates: Weights in order of preference, for example the folds of a cross-validation.
        traces: The traces.
        root_traces_by_name: The data root's own traces by name.
        option: The option that named the candidates, for messages.
        contaminated: Whether weights that were trained on a trace are allowed if all were.
        but_not: By trace name, the digest of weights that must not be used.

    Returns:
        By trace name: the weights, and their exposure to the trace.

    Raises:
        UserError: All candidates were trained on a trace, or none is left.
    """
    assigned: dict[str, Weights[Model]] = {}
    exposures: dict[str, Exposure] = {}
    for trace in traces:
        left = [one for one in candidates if not but_not or one.digest != but_not[trace.name]]
        if not left:
            raise UserError(
                f"{option}: the weights that filter the offers of {trace.name} also judge them",
                "Give other weights, or --gate-is-judge to allow it and mark the result.",
            )
        found = [one.exposure(trace, root_traces_by_name.get(trace.name)) for one in left]
        exposures[trace.name] = min(found)
        assigned[trace.name] = left[found.index(min(found))]
    known = [name for name, exposure in exposures.items() if exposure == Exposure.TRAINED]
    if known and not contaminated:
        raise UserError(
            f"{option}: trained on {len(known)} of the {len(traces)} traces to judge: {', '.join(known)}",
            "Give checkpoints of folds that leave them out, or --contaminated to allow it and mark the result.",
        )
    return assigned, exposures


def one_for_each(assigned: Mapping[str, Weights[Model]], make: Callable[[Weights[Model]], Made]) -> dict[str, Made]:
    """Call `make` once for each distinct weights, and return the results by trace name."""
    made: dict[str, Made] = {}
    for weights in assigned.values():
        if weights.digest not in made:
            made[weights.digest] = make(weights)
    return {name: made[weights.digest] for name, weights in assigned.items()}
