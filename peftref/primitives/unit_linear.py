"""Linear map whose rows or columns have norm one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["UnitLinear", "UnitLinearArguments"]


class UnitLinearArguments(Arguments):
    """``out``: width of the result (default: the port's); ``unit``: what has norm one."""

    out: int | None = Field(default=None, gt=0)
    unit: Literal["rows", "columns"] = "rows"
    init: str = "kaiming_uniform"


@primitives.register("unit_linear")
class UnitLinear(Primitive[UnitLinearArguments]):
    """``f(x) = x (W / max(||W||, 1e-4))^T``, the norms of the rows or columns of ``W``.

    DeLoRA, Bini et al. 2025, https://arxiv.org/abs/2503.18225
    """

    name = "unit_linear"
    Arguments = UnitLinearArguments

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        shape = (self.width, self.place.d_in)
        return (TensorSpec(f"{self.label}.direction", shape, self.arguments.init),)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(linear=True, matrix=True, zero_at_init=zero, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.place.d_in * self.width

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        along = 1 if self.arguments.unit == "rows" else 0

        def apply(x: Tensor, direction: Tensor) -> Tensor:
            norm = direction.norm(dim=along, keepdim=True).clamp(min=1e-4)
            return linear(x, direction / norm)

        return apply
