"""A matrix given by a few entries of its transform."""

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

__all__ = ["Spectrum", "SpectrumArguments"]


class SpectrumArguments(Arguments):
    """``count``: trained entries; ``seed``: of their places, the same for equal shapes."""

    kind: Literal["fourier", "haar"] = "fourier"
    count: int = Field(default=1000, gt=0)
    seed: int = 777
    init: str = "zeros"


@primitives.register("spectrum")
class Spectrum(Primitive[SpectrumArguments]):
    """``f(x) = x M^T``, ``M = Re(transform^-1(F))``, ``F`` zero but for ``count`` random entries.

    ``fourier``: two-dimensional, divided by the number of entries (FourierFT, Gao et al. 2024,
    https://arxiv.org/abs/2405.03003). ``haar``: one level of the Haar wavelet, its four bands in
    the quarters of ``F`` (WaveFT, Bilican et al. 2025, https://arxiv.org/abs/2505.12532).
    """

    name = "spectrum"
    Arguments = SpectrumArguments

    def __init__(self, arguments: SpectrumArguments, place: Place) -> None:
        super().__init__(arguments, place)
        entries = place.d_in * place.d_out
        if arguments.count > entries:
            raise CompositionError(
                f"spectrum: {arguments.count} entries of a matrix that has {entries}; lower count"
            )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, (self.arguments.count,), self.arguments.init),)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(linear=True, matrix=True, stream=False, zero_at_init=zero, keeps_zero=True)

    def matrix_flops(self) -> int:
        entries = self.place.d_in * self.place.d_out
        return 5 * entries * entries.bit_length()

    def bind(self, runtime: Runtime) -> Operation:
        return self.bind_matrix(runtime)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        shape = self.place.d_out, self.place.d_in
        haar = self.arguments.kind == "haar"
        generator = torch.Generator().manual_seed(self.arguments.seed)
        places = torch.randperm(shape[0] * shape[1], generator=generator)[: self.arguments.count]

        def matrix(before: Tensor | None, entries: Tensor) -> Tensor:
            # No transform is defined in 16 bits.
            wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
            index = places.to(wide.device)
            dense = wide.new_zeros(shape).flatten().index_put((index,), wide).view(shape)
            formed = _unhaar(dense) if haar else torch.fft.ifft2(dense).real
            formed = formed.to(entries.dtype)
            return formed if before is None else formed @ before

        return matrix


def _unhaar(bands: Tensor) -> Tensor:
    """The matrix whose averages and differences of neighbours fill the quarters."""
    import torch

    rows, columns = bands.shape
    padded = torch.nn.functional.pad(bands, (0, columns % 2, 0, rows % 2))
    top, bottom = padded.chunk(2, 0)
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    even = torch.stack((a + h + v + d, a + h - v - d), -1).flatten(-2)
    odd = torch.stack((a - h + v - d, a - h - v + d), -1).flatten(-2)
    return (torch.stack((even, odd), 1).flatten(0, 1) / 2)[:rows, :columns]
