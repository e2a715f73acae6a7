"""Trained weights, what they were trained on, and which of several may be asked about a trace."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from datamodules.corpus.traces import Trace, is_known
from datamodules.errors import UserError
from models.learning.training import BackboneModule

Model = TypeVar("Model", bound=BackboneModule)
Made = TypeVar("Made")


class Tie(IntEnum):
    """What weights have to do with a trace, the least first."""

    NONE = 0
    UNKNOWN = 1  # not trained on it; an old checkpoint does not say what it was validated on
    VALIDATED = 2  # it chose their best step and calibrated them
    TRAINED = 3


@dataclass(frozen=True)
class Weights(Generic[Model]):
    """A trained model, what its data module kept, and where it was loaded from."""

    model: Model
    state: dict[str, Any]
    source: str

    @cached_property
    def digest(self) -> str:
        """Of the weights, in hexadecimal: the same ones have the same."""
        assert self.model.network is not None, "a loaded model has weights"
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tie(self, trace: Trace, namesake: Trace | None) -> Tie:
        """Whether its training or validation rows hold the trace's session."""
        if self._holds("training", trace, namesake):
            return Tie.TRAINED
        if "validation_histories" not in self.state:
            return Tie.UNKNOWN
        return Tie.VALIDATED if self._holds("validation", trace, namesake) else Tie.NONE

    def _holds(self, rows: str, trace: Trace, namesake: Trace | None) -> bool:
        scenes, histories = self.state.get(f"{rows}_scenes"), self.state[f"{rows}_histories"]
        return is_known(trace, namesake, None if scenes is None else set(scenes), set(histories))


def best_device() -> torch.device:
    """Where a loaded model computes: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assign(
    candidates: Sequence[Weights[Model]],
    traces: Sequence[Trace],
    namesakes: Mapping[str, Trace],
    option: str,
    contaminated: bool = False,
    but_not: Mapping[str, str] | None = None,
) -> tuple[dict[str, Weights[Model]], dict[str, Tie]]:
    """Weights for each trace: the first of those with the least tie to it.

    Args:
        candidates: In order of preference; several are the folds of a cross-validation.
        traces: What is to be judged.
        namesakes: The data root's own traces by name.
        option: Where the candidates come from, for messages.
        contaminated: Whether to take weights that were trained on a trace where all were.
        but_not: By trace name, the digest of weights that are not to be taken.

    Returns:
        The weights by trace name, and what they have to do with the trace.

    Raises:
        UserError: All were trained on a trace, or none are left.
    """
    assigned: dict[str, Weights[Model]] = {}
    ties: dict[str, Tie] = {}
    for trace in traces:
        left = [one for one in candidates if not but_not or one.digest != but_not[trace.name]]
        if not left:
            raise UserError(
                f"{option}: the weights that hold offers back in {trace.name} are those that judge them",
                "Give other weights, or --gate-is-judge to measure it so and have it stamped on the result.",
            )
        found = [one.tie(trace, namesakes.get(trace.name)) for one in left]
        ties[trace.name] = min(found)
        assigned[trace.name] = left[found.index(min(found))]
    known = [name for name, tie in ties.items() if tie == Tie.TRAINED]
    if known and not contaminated:
        raise UserError(
            f"{option}: trained on {len(known)} of the {len(traces)} traces that it is to judge: {', '.join(known)}",
            "Give checkpoints of folds that leave them out, or --contaminated to have it stamped on the result.",
        )
    return assigned, ties


def one_for_each(assigned: Mapping[str, Weights[Model]], make: Callable[[Weights[Model]], Made]) -> dict[str, Made]:
    """What is made of the weights of each trace, once for the same weights."""
    made: dict[str, Made] = {}
    for weights in assigned.values():
        if weights.digest not in made:
            made[weights.digest] = make(weights)
    return {name: made[weights.digest] for name, weights in assigned.items()}
