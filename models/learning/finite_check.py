"""Detects loss and gradient norms that are not finite, one step late, so that no step waits for its device."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.errors import UserError


def not_finite_error(what: str, value: float, step: int) -> UserError:
    """The error that ends a run with a value that is not finite.

    Args:
        what: The name of the value.
        value: The value.
        step: The optimizer step.
    """
    return UserError(
        f"{what} is {value} at step {step}; the last good checkpoint is kept",
        "Resume from checkpoints/previous.ckpt if there is one, else from last.ckpt, with a smaller "
        "model.learning_rate or with trainer.precision 32-true.",
    )


class FiniteCheck:
    """Copies a step's values to the CPU in the background, and checks them when they are needed.

    After the first value that is not finite, each call reports this value.
    """

    def __init__(self) -> None:
        self._found: tuple[str, float, int] | None = None
        self._names: tuple[str, ...] = ()
        self._values = torch.empty(0)
        self._step = 0
        self._copied: torch.cuda.Event | None = None

    def note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Note a step's values. Those of the previous step must have been checked.

        Args:
            step: The optimizer step.
            values: Tensors () by name, on one device.
        """
        self._names, self._step = tuple(values), step
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if stacked.device.type != "cuda":
            self._values = stacked.cpu()
            return
        self._values = torch.empty(len(stacked), dtype=stacked.dtype, pin_memory=True)
        self._values.copy_(stacked, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def problem(self) -> tuple[str, float, int] | None:
        """Wait for the noted step and check its values.

        Returns:
            Name, value and step of the first value that was not finite; None if all are.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        if self._found is None:
            for name, value in zip(self._names, self._values.numpy().tolist(), strict=True):
                if not math.isfinite(value):
                    self._found = (name, value, self._step)
                    break
        return self._found
