"""Finds a step whose numbers are none, one step late, so that no step waits for its device."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class FiniteCheck:
    """Keeps a step's numbers until they are read: on their way to the host while the device goes on.

    What was found once stays found.
    """

    def __init__(self) -> None:
        self._found: tuple[str, float, int] | None = None
        self._names: tuple[str, ...] = ()
        self._numbers = torch.empty(0)
        self._step = 0
        self._copied: torch.cuda.Event | None = None

    def note(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Take a step's numbers, each a tensor (), in place of those of the step before, which must have been read."""
        self._names, self._step = tuple(numbers), step
        values = torch.stack([number.detach().float() for number in numbers.values()])
        if values.device.type != "cuda":
            self._numbers = values.cpu()
            return
        self._numbers = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
        self._numbers.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def problem(self) -> tuple[str, float, int] | None:
        """The first number noted that is not finite: its name, itself, and its step; None if all are.

        It waits for the step that was noted, which is over where a later one has been asked for.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        if self._found is None:
            values = self._numbers.numpy().tolist()
            bad = [(name, value) for name, value in zip(self._names, values, strict=True) if not math.isfinite(value)]
            self._found = (*bad[0], self._step) if bad else None
        return self._found
