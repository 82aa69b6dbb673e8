"""Trained difference of a tensor that the backbone already has."""

from __future__ import annotations

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

__all__ = ["Delta", "DeltaArguments"]


class DeltaArguments(Arguments):
    """``trainable`` false: no gradient reaches it, a procedure moves it."""

    trainable: bool = True


@primitives.register("delta")
class Delta(Primitive[DeltaArguments]):
    """``theta = theta_0 + d`` with trained ``d``, zero at first: partial tuning.

    Stored as a difference, so that weight decay pulls to the pretrained value.
    """

    name = "delta"
    Arguments = DeltaArguments

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        trained = self.arguments.trainable
        return (TensorSpec(self.label, self.place.port_shape, "zeros", trainable=trained,
                           buffer=not trained),)

    def algebra(self) -> Algebra:
        return Algebra(source=True, zero_at_init=True, matrix=True)

    def bind(self, runtime: Runtime) -> Operation:
        return lambda difference: difference

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return lambda difference: difference
