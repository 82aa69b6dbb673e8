"""Keys and values that the attention's own projections make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftref.errors import CompositionError
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OwnKeysValues", "OwnKeysValuesArguments"]


class OwnKeysValuesArguments(Arguments):
    """``gate``: a number for each key-value head, or one for the layer; ``squash``: its tanh."""

    gate: Literal["head", "layer"] = "head"
    squash: bool = True


@primitives.register("own_keys_values")
class OwnKeysValues(Primitive[OwnKeysValuesArguments]):
    """``(W_K p + b_K, tanh(g) (W_V p + b_V))`` of rows ``p``, with the layer's frozen projections.

    ``g`` is zero at first. Values are gated where attention over these rows is: attention is
    linear in them, ``g softmax(q K^T) V = softmax(q K^T) (g V)``. LLaMA-Adapter, Zhang et al.
    2023, https://arxiv.org/abs/2303.16199
    """

    name = "own_keys_values"
    Arguments = OwnKeysValuesArguments
    reads_projections = True

    def __init__(self, arguments: OwnKeysValuesArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if not place.heads or place.d_in != place.hidden_size:
            raise CompositionError(
                "own_keys_values: projects rows as wide as the residual stream (tokens: "
                "{width: hidden_size}) to port keys_values"
            )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        count = self.place.heads if self.arguments.gate == "head" else 1
        return (TensorSpec("gate", (count,), "zeros"),)

    def algebra(self) -> Algebra:
        return Algebra(zero_at_init=True)  # of the values, and so of what attention gives

    def flops(self) -> int:
        return 2 * self.place.d_in * self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        heads, squash = self.place.heads, self.arguments.squash

        def project(rows: Tensor, gate: Tensor) -> Tensor:
            keys, values = runtime.keys_values(rows)
            gate = gate.tanh() if squash else gate
            opened = values.unflatten(-1, (heads, -1)) * gate[:, None]
            return torch.cat((keys, opened.flatten(-2)), -1)

        return project
