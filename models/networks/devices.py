"""What devices lack."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # device types; a float64 tensor cannot be created there


def as_float64(values: Tensor) -> Tensor:
    """The values in float64: on their device, or on the CPU if their device has no float64."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).to(torch.float64)
