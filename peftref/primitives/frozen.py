"""Linear map that is not trained: a seeded random projection."""

from __future__ import annotations

from dataclasses import replace

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

__all__ = ["Frozen", "FrozenArguments"]


class FrozenArguments(Arguments):
    """``share``: one tensor of the largest shape for the model, its leading corner used.

    ``seed`` none: the adapter's, so that every site has its own. What starts at values of the
    backbone has no seed, and is stored.
    """

    out: int | None = None
    init: str = "kaiming_uniform"
    seed: int | None = 0
    share: str | None = None


@primitives.register("frozen")
class Frozen(Primitive[FrozenArguments]):
    """``f(x) = x W^T`` with a fixed random ``W`` (out, in)."""

    name = "frozen"
    Arguments = FrozenArguments

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        spec = TensorSpec(
            f"{self.label}.weight",
            (self.width, self.place.d_in),
            a.init,
            trainable=False,
            seed=a.seed,
            share=a.share,
            sliced=a.share is not None,
        )
        return (replace(spec, buffer=spec.from_backbone),)

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    @property
    def link(self) -> Link:
        return Link("product")

    def flops(self) -> int:
        return 2 * self.place.d_in * self.width

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        return linear

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return lambda before, weight: weight if before is None else weight @ before
