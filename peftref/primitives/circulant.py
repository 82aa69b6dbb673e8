"""Block-circulant matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

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

__all__ = ["Circulant", "CirculantArguments"]


class CirculantArguments(Arguments):
    """``block``: side of a circulant block; it divides both widths."""

    block: int = Field(default=32, gt=0)
    init: Literal["xavier_uniform", "zeros"] = "xavier_uniform"


@primitives.register("circulant")
class Circulant(Primitive[CirculantArguments]):
    """``f(x)_i = sum_j circ(w_ij) x_j / d_in``, by fast Fourier transforms.

    ``circ(w)_ab = w_((b - a) mod block)``; Xavier's bound is that of the whole matrix. C3A, Chen et
    al. 2024, https://arxiv.org/abs/2407.19342
    """

    name = "circulant"
    Arguments = CirculantArguments

    def __init__(self, arguments: CirculantArguments, place: Place) -> None:
        super().__init__(arguments, place)
        for width in (place.d_in, place.d_out):
            if not width or width % arguments.block:
                raise CompositionError(
                    f"circulant: block {arguments.block} does not divide width {width}; give a "
                    "divisor of both widths"
                )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        b, widths = self.arguments.block, (self.place.d_in, self.place.d_out)
        bound = (6 / sum(widths)) ** 0.5
        init = "zeros" if self.arguments.init == "zeros" else f"uniform({bound})"
        return (TensorSpec(self.label, (widths[1] // b, widths[0] // b, b), init),)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(linear=True, matrix=True, zero_at_init=zero, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.place.d_in * self.place.d_out // self.arguments.block

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        block, d_in = self.arguments.block, self.place.d_in

        def apply(x: Tensor, kernel: Tensor) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            parts = torch.fft.ifft(x.to(wide).unflatten(-1, (-1, block)))
            spectrum = torch.fft.fft(kernel.to(wide))
            mixed = torch.einsum("...nb,mnb->...mb", parts, spectrum)
            return torch.fft.fft(mixed).real.flatten(-2).to(x.dtype) / d_in

        return apply
