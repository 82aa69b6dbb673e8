"""The machine that a model is on, as plans know it."""

from __future__ import annotations

import torch
from torch import nn

from peftref.errors import CompositionError
from peftref.ir.device import DEVICES, Device, device_named

__all__ = ["device_of"]


def device_of(model: nn.Module) -> Device:
    """Return the description of the device of a model's first parameter.

    A GPU that is not known counts as an A100: ratios of rate to bandwidth differ less between GPUs
    than between a GPU and a CPU.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cuda":
        return DEVICES["cpu"]
    try:
        return device_named(torch.cuda.get_device_name(parameter.device))
    except CompositionError:
        return DEVICES["a100"]
