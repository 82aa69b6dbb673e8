"""A trained difference of few chosen rows of a weight."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

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

__all__ = ["ChosenRows", "ChosenRowsArguments"]

_PART = re.compile(r"(\d+)(?::(\d+))?")


class ChosenRowsArguments(Arguments):
    """``rows``: numbers and ranges, such as ``5, 9, 100:110`` (the end is left out)."""

    rows: str


@primitives.register("chosen_rows")
class ChosenRows(Primitive[ChosenRowsArguments]):
    """``W' = W + D``, ``D`` zero but in the chosen rows, where it is trained from zero.

    Rows of the token embedding are tokens: PEFT's trainable tokens,
    https://huggingface.co/docs/peft/package_reference/trainable_tokens
    """

    name = "chosen_rows"
    Arguments = ChosenRowsArguments

    def __init__(self, arguments: ChosenRowsArguments, place: Place) -> None:
        super().__init__(arguments, place)
        self.rows = _rows(arguments.rows)
        most = place.port_shape[0]
        if not self.rows or self.rows[-1] >= most:
            raise CompositionError(
                f"chosen_rows: rows {arguments.rows!r} must name some of the rows 0 to {most - 1}"
            )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        shape = (len(self.rows), *self.place.port_shape[1:])
        return (TensorSpec(self.label, shape, "zeros"),)

    def algebra(self) -> Algebra:
        return Algebra(source=True, zero_at_init=True, matrix=True)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        rows, shape = self.rows, self.place.port_shape

        def spread(values: Tensor) -> Tensor:
            index = torch.tensor(rows, device=values.device)
            return values.new_zeros(shape).index_copy(0, index, values)

        return spread

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return self.bind(runtime)


def _rows(text: str) -> tuple[int, ...]:
    """Return the rows that a text names, ascending, each once."""
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise CompositionError(
                f"chosen_rows: {part.strip()!r} is no row; write numbers and ranges: 5, 9, 100:110"
            )
        first = int(match[1])
        found.update(range(first, int(match[2]) if match[2] else first + 1))
    return tuple(sorted(found))
