"""The weight as it is once stored in few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from peftref.errors import CompositionError
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Quantise", "QuantiseArguments"]


class QuantiseArguments(Arguments):
    """``kind``: nf4, or int with 2 to 8 ``bits``; ``block``: entries that share a scale.

    ``rounds`` above 0 alternates with a low-rank part of ``rank``, which the initialisers
    ``loftq_up`` and ``loftq_down`` of the same arguments give.
    """

    kind: Literal["nf4", "int"] = "nf4"
    bits: int = Field(default=4, ge=2, le=8)
    block: int = Field(default=64, gt=1)
    rank: int = Field(default=8, gt=0)
    rounds: int = Field(default=0, ge=0, le=100)

    @model_validator(mode="after")
    def _nf4_has_four_bits(self) -> Self:
        if self.kind == "nf4" and self.bits != 4:
            raise ValueError("nf4 has 4 bits; use kind int for other numbers of bits")
        return self


@primitives.register("quantise")
class Quantise(Primitive[QuantiseArguments]):
    """``f(W) = dequantise(quantise(W))``, fixed: the same numbers on any device.

    What stores the codes is the backbone, when it is loaded quantised. QLoRA, Dettmers et al.
    2023, https://arxiv.org/abs/2305.14314
    """

    name = "quantise"
    Arguments = QuantiseArguments

    def __init__(self, arguments: QuantiseArguments, place: Place) -> None:
        super().__init__(arguments, place)
        d_in = place.port_shape[-1] if place.port_shape else 0
        if arguments.kind == "int" and (not d_in or d_in % arguments.block):
            raise CompositionError(
                f"quantise: blocks of {arguments.block} do not divide the {d_in} inputs; give a "
                "divisor as block"
            )

    def algebra(self) -> Algebra:
        return Algebra(matrix=True, stream=False, base=True)

    def bind(self, runtime: Runtime) -> Operation:
        return self.bind_matrix(runtime)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        from peftref.ops.quantised import Grid, alternate, rounded

        a = self.arguments
        grid = Grid(a.kind, a.bits, a.block)

        def matrix(weight: Tensor) -> Tensor:
            if a.rounds:
                return alternate(weight, grid, a.rank, a.rounds)[0]
            return rounded(weight, grid)

        return matrix
