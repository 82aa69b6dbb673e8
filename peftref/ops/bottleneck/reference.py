"""The definition of a bottleneck."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "bottleneck"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x * 1,
}


def bottleneck(
    x: Tensor,
    into: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    activation: str,
    residual: bool,
) -> Tensor:
    """``[x or into] + gate * scale * (U phi(D x + b_D) + b_U)``.

    Args:
        x: (..., d).
        into: (..., k), the stream that is added to, instead of ``x``.
        down: ``D`` (b, d).
        down_bias: ``b_D`` (b).
        up: ``U`` (k, b).
        up_bias: ``b_U`` (k).
        scale: ().
        gate: one number a row: of a shape that broadcasts to (..., 1).
        activation: ``phi``, a key of ``ACTIVATIONS``.
        residual: whether ``x`` itself is added.
    """

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.dtype)

    hidden = ACTIVATIONS[activation](F.linear(x, down.to(x.dtype), own(down_bias)))
    y = F.linear(hidden, up.to(x.dtype), own(up_bias)) * scale.to(x.dtype)
    y = y if gate is None else y * gate.to(x.dtype)
    y = y if into is None else y + into
    return y + x if residual else y
