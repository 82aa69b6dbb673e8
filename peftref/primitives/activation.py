"""Elementwise non-linearity."""

from __future__ import annotations

from typing import Literal

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime
from peftref.registry import primitives

__all__ = ["Activation", "ActivationArguments"]


class ActivationArguments(Arguments):
    """``kind``: the function."""

    kind: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "identity"] = "relu"


@primitives.register("activation")
class Activation(Primitive[ActivationArguments]):
    """``f(x) = phi(x)``."""

    name = "activation"
    Arguments = ActivationArguments

    def algebra(self) -> Algebra:
        identity = self.arguments.kind == "identity"
        return Algebra(
            linear=identity,
            matrix=identity,
            diagonal=identity,
            orthogonal=identity,
            identity_at_init=identity,
            keeps_zero=self.arguments.kind != "sigmoid",
        )

    @property
    def link(self) -> Link:
        return Link("activation", self.arguments.kind)

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn import functional

        def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
            return functional.gelu(x, approximate="tanh")

        def identity(x: torch.Tensor) -> torch.Tensor:
            return x

        forms: dict[str, Operation] = {
            "relu": functional.relu,
            "gelu": functional.gelu,
            "gelu_tanh": gelu_tanh,
            "silu": functional.silu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "identity": identity,
        }
        return forms[self.arguments.kind]

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return lambda before: before
