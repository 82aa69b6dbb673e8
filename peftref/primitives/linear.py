"""Linear map, trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Linear", "LinearArguments"]


class LinearArguments(Arguments):
    """``out``: width of the result (default: the port's); ``share``: one tensor for all sites."""

    out: int | None = Field(default=None, gt=0)
    bias: bool = False
    init: str = "kaiming_uniform"
    bias_init: str = "zeros"
    share: str | None = None


@primitives.register("linear")
class Linear(Primitive[LinearArguments]):
    """``f(x) = x W^T + b``; ``W`` (out, in), ``b`` (out)."""

    name = "linear"
    Arguments = LinearArguments

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        weight = TensorSpec(
            f"{self.label}.weight", (self.width, self.place.d_in), a.init, share=a.share
        )
        if not a.bias:
            return (weight,)
        return weight, TensorSpec(f"{self.label}.bias", (self.width,), a.bias_init, share=a.share)

    def algebra(self) -> Algebra:
        a = self.arguments
        zero_bias = not a.bias or a.bias_init == "zeros"
        return Algebra(
            linear=not a.bias,
            matrix=not a.bias,
            zero_at_init=a.init == "zeros" and zero_bias,
            keeps_zero=zero_bias,
        )

    @property
    def link(self) -> Link:
        return Link("affine" if self.arguments.bias else "product")

    def flops(self) -> int:
        return 2 * self.place.d_in * self.width

    def matrix_flops(self) -> int:
        return 0  # the product with the matrix before it is counted by whoever forms it

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        return linear

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def matrix(before: Tensor | None, weight: Tensor) -> Tensor:
            return weight if before is None else weight @ before

        return matrix
