"""Trained weights, what they were trained on, and which of several may be asked about a trace."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from datamodules.errors import UserError
from datamodules.traces import Trace, is_known
from models.training import BackboneModule

Model = TypeVar("Model", bound=BackboneModule)


@dataclass(frozen=True)
class Weights(Generic[Model]):
    """A trained model, what its data module kept, and where it was loaded from."""

    model: Model
    state: dict[str, Any]
    source: str
    digest: str

    @classmethod
    def of(cls, model: Model, state: dict[str, Any], source: str) -> "Weights[Model]":
        """Weights as they were loaded, with their digest: the same ones have the same."""
        assert model.network is not None, "a loaded model has weights"
        digest = hashlib.sha256()
        for name, weight in sorted(model.network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return cls(model, state, source, digest.hexdigest())

    def knows(self, trace: Trace, namesake: Trace | None) -> bool:
        """Whether its training rows hold the trace's session."""
        scenes = self.state.get("training_scenes")
        return is_known(trace, namesake, None if scenes is None else set(scenes), set(self.state["training_histories"]))


def assign(
    candidates: Sequence[Weights[Model]],
    traces: Sequence[Trace],
    namesakes: Mapping[str, Trace],
    option: str,
    contaminated: bool = False,
    but_not: Mapping[str, str] | None = None,
) -> tuple[dict[str, Weights[Model]], list[str]]:
    """Weights for each trace: the first that were not trained on it.

    Args:
        candidates: In order of preference; several are the folds of a cross-validation.
        traces: What is to be judged.
        namesakes: The data root's own traces by name.
        option: Where the candidates come from, for messages.
        contaminated: Whether to take the first ones where all were trained on a trace.
        but_not: By trace name, the digest of weights that are not to be taken.

    Returns:
        The weights by trace name, and the names of the traces that they were trained on.

    Raises:
        UserError: All were trained on a trace, or none are left.
    """
    assigned: dict[str, Weights[Model]] = {}
    known: list[str] = []
    for trace in traces:
        left = [one for one in candidates if not but_not or one.digest != but_not[trace.name]]
        if not left:
            raise UserError(
                f"{option}: the weights that hold offers back in {trace.name} are those that judge them",
                "Give other weights, or --gate-is-judge to measure it so and have it stamped on the result.",
            )
        clean = [one for one in left if not one.knows(trace, namesakes.get(trace.name))]
        if not clean:
            known.append(trace.name)
        assigned[trace.name] = (clean or left)[0]
    if known and not contaminated:
        raise UserError(
            f"{option}: trained on {len(known)} of the {len(traces)} traces that it is to judge: {', '.join(known)}",
            "Give checkpoints of folds that leave them out, or --contaminated to have it stamped on the result.",
        )
    return assigned, known
