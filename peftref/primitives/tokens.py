"""Learned rows for a sequence."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

__all__ = ["Tokens", "TokensArguments"]


class TokensArguments(Arguments):
    """``length``: number of rows; ``width``: their width (default: the port's)."""

    length: int = Field(default=10, gt=0)
    width: int | Literal["hidden_size"] | None = None
    init: str = "normal(0.02)"
    share: str | None = None


@primitives.register("tokens")
class Tokens(Primitive[TokensArguments]):
    """A trained matrix ``P`` (length, width), without input."""

    name = "tokens"
    Arguments = TokensArguments

    @property
    def width(self) -> int:
        width = self.arguments.width
        if width == "hidden_size":
            return self.place.hidden_size
        return width or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        return (TensorSpec(self.label, (a.length, self.width), a.init, share=a.share),)

    def algebra(self) -> Algebra:
        return Algebra(source=True, zero_at_init=self.arguments.init == "zeros")

    def bind(self, runtime: Runtime) -> Operation:
        return lambda rows: rows
