"""What the ways to compute an edit cost in one step, forward and backward, from shapes alone.

Bytes and FLOPs beyond those of the frozen module; time is their sum on a device, nothing assumed to
overlap. ``T`` tokens, ``d`` wide in and ``k`` wide out, rank ``r``. All passes over a tensor are
counted in elements of the stream's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftref.ir.device import Device, element_size

__all__ = ["Passes", "Shape", "Work", "frozen", "low_rank", "normalised", "rotated"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens a step, and the widths of the module that is edited."""

    tokens: int
    d_in: int
    d_out: int

    @property
    def read(self) -> int:
        """Elements of the input."""
        return self.tokens * self.d_in

    @property
    def written(self) -> int:
        """Elements of the output."""
        return self.tokens * self.d_out

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.d_in * self.d_out

    @property
    def product(self) -> float:
        """FLOPs of one product with the weight."""
        return 2.0 * self.tokens * self.weight


Passes = tuple[tuple[float, int], ...]
"""How often tensors are read or written, and their elements."""


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs, and passes over tensors."""

    flops: float = 0.0
    passes: Passes = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.passes + other.passes)

    def seconds(self, device: Device, dtype: str) -> float:
        """Time on a device: products plus passes over what its cache does not hold."""
        size = element_size(dtype)
        moved = sum(times * n * size for times, n in self.passes if n * size > device.cache)
        return self.flops / device.rate(dtype) + moved / device.bandwidth


def frozen(shape: Shape) -> Work:
    """Forward and input gradient of the frozen module itself; its passes hide behind products."""
    return Work(2 * shape.product)


def low_rank(shape: Shape, rank: int) -> dict[str, Work]:
    """``y + s (x A^T) B^T``, by the name of the way.

    ==========  =================================================================================
    split       down-projection beside the frozen product, up-projection in its accumulator: one
                more read of x in each pass and one of the output's gradient
    accumulate  products of a matrix library that add into what is there
    eager       one operation after the other, as a module on top of the frozen one does it
    merged      ``W + s B A`` in both passes, gradients by the factors
    formed      ``W + s B A`` with a gradient of the whole weight
    ==========  =================================================================================
    """
    x, y, w = shape.read, shape.written, shape.weight
    thin = 6.0 * shape.tokens * rank * (shape.d_in + shape.d_out)
    form = 2.0 * rank * w
    return {
        "split": Work(thin, ((2, x), (1, y))),
        "accumulate": Work(thin, ((4, x), (4, y))),
        "eager": Work(thin, ((6, x), (10, y))),
        "merged": Work(thin * 2 / 3 + form, ((2, x), (2, y), (3, w))),
        "formed": Work(shape.product + 3 * form, ((4, w),)),
    }


def normalised(shape: Shape, rank: int) -> Work:
    """The rows of ``W + s B A`` set to trained norms, which products of the factors give."""
    return Work(2.0 * rank * shape.weight, ((1, shape.written), (1, shape.weight)))


def rotated(shape: Shape, flops: float) -> dict[str, Work]:
    """``(x R) W^T``; ``flops`` of one rotation of one row.

    ==========  =================================================================================
    stream      x is rotated, and so is its gradient
    folded      ``W R^T`` once a step; the gradient of R from x and ``dy W``
    formed      ``W R^T`` with a gradient of the whole weight
    ==========  =================================================================================
    """
    x, w = shape.read, shape.weight
    turn = 3.0 * shape.tokens * flops
    return {
        "stream": Work(turn, ((5, x),)),
        "folded": Work(turn * 2 / 3 + shape.d_out * flops, ((2, x), (2, w))),
        "formed": Work(shape.product + 3.0 * shape.d_out * flops, ((4, w),)),
    }
