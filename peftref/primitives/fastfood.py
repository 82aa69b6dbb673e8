"""Random projection of a few trained numbers onto a whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

__all__ = ["Fastfood", "FastfoodArguments"]


class FastfoodArguments(Arguments):
    """``size``: trained numbers, which all sites share; ``scaled``: one more number a site."""

    size: int = Field(default=200, gt=0)
    scaled: bool = True
    share: str = "intrinsic"
    seed: int = 0


@primitives.register("fastfood")
class Fastfood(Primitive[FastfoodArguments]):
    """``f(x) = x M^T`` with ``vec(M) = s P z``, ``P = H G Pi H B / sqrt(n sum G^2)``.

    ``H`` is Walsh and Hadamard's transform of ``n`` entries, a power of two; ``B`` random signs and
    ``G`` normal numbers are frozen, each site's own; the order ``Pi`` is that of equal sizes. SAID,
    structure-aware with a number ``s`` for each site, Aghajanyan et al. 2021,
    https://arxiv.org/abs/2012.13255; Fastfood, Le et al. 2013
    """

    name = "fastfood"
    Arguments = FastfoodArguments

    def __init__(self, arguments: FastfoodArguments, place: Place) -> None:
        super().__init__(arguments, place)
        entries = place.d_in * place.d_out
        if not entries or arguments.size > entries:
            raise CompositionError(
                f"fastfood: {arguments.size} numbers for a matrix of {entries}; lower the size"
            )
        self.padded = 1 << (entries - 1).bit_length()

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, label, whole = self.arguments, self.label, (self.padded,)
        trained = [TensorSpec(f"{label}.intrinsic", (a.size,), "zeros", share=a.share)]
        if a.scaled:
            trained.append(TensorSpec(f"{label}.scale", (1,), "ones"))
        return (
            TensorSpec(f"{label}.signs", whole, "signs", trainable=False),
            TensorSpec(f"{label}.normal", whole, "normal(1.0)", trainable=False),
            *trained,
        )

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, stream=False, zero_at_init=True, keeps_zero=True)

    def matrix_flops(self) -> int:
        return 2 * self.padded * self.padded.bit_length()

    def bind(self, runtime: Runtime) -> Operation:
        return self.bind_matrix(runtime)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        shape = self.place.d_out, self.place.d_in
        entries, padded = shape[0] * shape[1], self.padded
        generator = torch.Generator().manual_seed(self.arguments.seed)
        order = torch.randperm(padded, generator=generator)

        def matrix(
            before: Tensor | None, signs: Tensor, normal: Tensor, *trained: Tensor
        ) -> Tensor:
            # A sum of so many terms is not for 16 bits.
            dtype = signs.dtype
            wide = torch.promote_types(dtype, torch.float32)
            signs, normal, first, *scale = (t.to(wide) for t in (signs, normal, *trained))
            z = torch.nn.functional.pad(first, (0, padded - len(first)))
            mixed = _hadamard(signs * z)[order.to(normal.device)] * normal
            size = (padded * normal.square().sum()).sqrt()
            formed = (_hadamard(mixed)[:entries] / size).view(shape)
            formed = formed * scale[0] if scale else formed
            return formed.to(dtype) if before is None else formed.to(dtype) @ before

        return matrix


def _hadamard(values: Tensor) -> Tensor:
    """The transform of a vector whose length is a power of two, not normalised."""
    import torch

    half = len(values)
    while half > 1:
        half //= 2
        first, second = values.view(-1, 2, half).unbind(1)
        values = torch.stack((first + second, first - second), 1).flatten()
    return values
