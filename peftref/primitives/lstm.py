"""Bidirectional recurrent layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lstm", "LstmArguments"]

_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LstmArguments(Arguments):
    """``hidden``: width of each direction."""

    hidden: int = Field(default=128, gt=0)
    layers: int = Field(default=1, gt=0)


@primitives.register("lstm")
class Lstm(Primitive[LstmArguments]):
    """A bidirectional LSTM over rows, (rows, d) to (rows, 2 hidden); P-tuning's prompt encoder.

    Weights and biases start uniform in +-1/sqrt(hidden), as in torch. Liu et al. 2021,
    https://arxiv.org/abs/2103.10385
    """

    name = "lstm"
    Arguments = LstmArguments

    @property
    def width(self) -> int:
        return 2 * self.arguments.hidden

    def tensors(self) -> tuple[TensorSpec, ...]:
        h = self.arguments.hidden
        init = f"uniform({h ** -0.5!r})"
        found: list[TensorSpec] = []
        for layer in range(self.arguments.layers):
            d = self.place.d_in if layer == 0 else 2 * h
            for direction in ("", "_reverse"):
                for part, shape in zip(_PARTS, ((4 * h, d), (4 * h, h), (4 * h,), (4 * h,)),
                                       strict=True):
                    name = f"{self.label}.{part}_l{layer}{direction}"
                    found.append(TensorSpec(name, shape, init))
        return tuple(found)

    def algebra(self) -> Algebra:
        return Algebra(mixes_tokens=True)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        # Of learned rows it mixes the rows, not the tokens of a sequence.
        return Algebra(source=inputs[0].source, mixes_tokens=not inputs[0].source)

    def flops(self) -> int:
        return sum(2 * t.size for t in self.tensors() if len(t.shape) == 2)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        h, layers = self.arguments.hidden, self.arguments.layers

        def run(rows: Tensor, *weights: Tensor) -> Tensor:
            zeros = rows.new_zeros(2 * layers, 1, h)
            out, _, _ = torch.lstm(rows[None], (zeros, zeros), list(weights), True, layers, 0.0,
                                   False, True, True)
            return out[0]

        return run
