"""Modules whose weights accelerate keeps elsewhere (``device_map``) and brings for each call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_offloaded", "offloaded_tensor", "runs_on"]


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own tensors are absent between calls."""
    return next(_hooks(module), None) is not None


def runs_on(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None: where its tensors are."""
    for hook in _hooks(module):
        return torch.device(hook.execution_device)
    return None


def offloaded_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The values of an absent tensor; None where the module is not offloaded."""
    for hook in _hooks(module):
        return hook.weights_map[name]
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that bring and take away this module's own tensors."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each
