"""Run the flat program of an edit, on the stream or on matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftref.backbone.site_table import RowSlice
from peftref.ir.edits import EditPlan
from peftref.spec.typology import IntegrationKind

if TYPE_CHECKING:
    from peftref.ir.primitive import Operation, Runtime

__all__ = ["BoundEdit", "gather_rows", "scatter_rows"]

_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD, IntegrationKind.GATED_ADD)


def gather_rows(value: Tensor, rows: RowSlice | None, dim: int = -1) -> Tensor:
    """Take the rows of a slice along ``dim``."""
    if rows is None:
        return value
    dim = dim % value.dim()
    parts = value.unflatten(dim, (rows.groups, rows.size))
    return parts.narrow(dim + 1, rows.start, rows.length).flatten(dim, dim + 1)


def scatter_rows(value: Tensor, rows: RowSlice | None, dim: int = -1) -> Tensor:
    """Put the rows of a slice at their place along ``dim``, zeros elsewhere."""
    if rows is None:
        return value
    dim = dim % value.dim()
    parts = value.unflatten(dim, (rows.groups, rows.length))
    after = rows.size - rows.start - rows.length
    trailing = value.dim() - 1 - dim
    padding = [0, 0] * trailing + [rows.start, after]
    return torch.nn.functional.pad(parts, padding).flatten(dim, dim + 1)


class BoundEdit:
    """An edit with torch forms and tensors at hand.

    Args:
        edit: the plan of the edit.
        runtime: training flag and padding mask of the running call.
        fetch: returns the current tensor of a name (never held, so that a replaced parameter is
            seen).
        scale: what the adapter as a whole is scaled by.
    """

    def __init__(
        self,
        edit: EditPlan,
        runtime: Runtime,
        fetch: tuple[Callable[[], Tensor], ...],
        scale: float = 1.0,
    ) -> None:
        self.edit = edit
        self.stage = edit.stage
        self.kind = edit.write.kind
        self.rows = edit.write.site.rows
        self.draws = edit.write.algebra is not None and edit.write.algebra.random
        self.scale = (edit.write.scale if edit.write.scale is not None else 1.0) * scale
        self._fetch = fetch
        self._result = edit.program.result
        self._inputs = tuple(step.inputs for step in edit.program.steps)
        steps = edit.program.steps
        # A first step without tensors (a fold of the stream) does not know the type of its result.
        self._needs_identity = any(step.inputs == (0,) for step in steps)
        algebra = edit.write.algebra
        self._stream: tuple[Operation, ...] = tuple(s.primitive.bind(runtime) for s in steps)
        self._matrix: tuple[Operation, ...] = ()
        if algebra is not None and algebra.matrix:
            self._matrix = tuple(
                s.primitive.bind(runtime)
                if s.primitive.on_tensors
                else s.primitive.bind_matrix(runtime)
                for s in steps
            )

    def stream(self, x: Tensor) -> Tensor:
        """``s f(x)``: the activation form, scaled where the integration adds."""
        if self.edit.write.needs_matrix:
            return torch.nn.functional.linear(x, self.matrix(None, x.dtype))
        value = self._run(self._stream, x, x.dtype)
        return value if self.scale == 1.0 else value * self.scale

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` joined by ``s f(x)``; a last product adds into ``y`` by itself."""
        if not self.edit.write.accumulates:
            return self.join(y, self.stream(x))
        registers = self._registers(self._stream[:-1], x, x.dtype)
        hidden, weight = (registers[i] for i in self._inputs[-1])
        if hidden is None or weight is None or hidden.dtype != y.dtype:
            return self.join(y, self.stream(x))
        flat = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(*flat, weight.t(), alpha=self.scale).view(y.shape)

    def rows_of_tokens(self, like: Tensor) -> Tensor:
        """The learned rows of a source, in the type of ``like``; ``like`` feeds gates."""
        return self.stream(like)

    def matrix(self, before: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``s M``: the matrix form, of the identity or of the weight ``before``."""
        if before is None and self._needs_identity:
            held = self._fetch[0]()
            wide = self.edit.write.site.d_in
            before = torch.eye(wide, dtype=dtype, device=held.device)
        value = self._run(self._matrix, before, dtype)
        return value if self.scale == 1.0 else value * self.scale

    def linear_tensors(self) -> tuple[Tensor, ...]:
        """The weights of the linear links, in order, as training left them (mixed, masked)."""
        registers: list[Tensor | None] = [None, *(fetch() for fetch in self._fetch)]
        weights: list[Tensor] = []
        for step, form in zip(self.edit.program.steps, self._stream, strict=True):
            if step.primitive.on_tensors:
                registers.append(form(*[registers[i] for i in step.inputs]))
                continue
            registers.append(None)
            held = [registers[i] for i in step.inputs]
            weights.extend(tensor for tensor in held if tensor is not None)
        return tuple(weights)

    def row_scale(self, weight: Tensor) -> Tensor:
        """What a normalisation multiplies each row of ``weight`` by."""
        return self._run(self._stream, weight, weight.dtype)

    def _run(
        self, forms: tuple[Operation, ...], first: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        result = self._registers(forms, first, dtype)[self._result]
        if result is None:
            raise TypeError(f"{self.edit.write.label}: the program gave nothing")
        return result

    def _registers(
        self, forms: tuple[Operation, ...], first: Tensor | None, dtype: torch.dtype
    ) -> list[Tensor | None]:
        registers: list[Tensor | None] = [first]
        for fetch in self._fetch:
            tensor = fetch()
            cast = tensor.dtype != dtype and tensor.is_floating_point()
            registers.append(tensor.to(dtype) if cast else tensor)
        for form, inputs in zip(forms, self._inputs, strict=False):
            registers.append(form(*[registers[i] for i in inputs]))
        return registers

    def join_whole(self, x: Tensor) -> Tensor:
        """The sequential edit of a whole stream, as if no slice were selected."""
        return x + self.stream(x) if self.kind in _ADDS else self.stream(x)

    def join_matrix(self, before: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix of a sequential edit joined to its stream, applied to ``before``."""
        value = self.matrix(before, dtype)
        return before + value if self.kind in _ADDS else value

    def join(self, stream: Tensor, value: Tensor) -> Tensor:
        """Join ``value`` to ``stream`` by the integration kind."""
        if self.kind in _ADDS:
            return stream + scatter_rows(value, self.rows)
        if self.kind is IntegrationKind.RESCALE and self.edit.write.insertion.value == "parallel":
            value = gather_rows(stream, self.rows) * value
        if self.rows is None:
            return value
        return stream + scatter_rows(value - gather_rows(stream, self.rows), self.rows)
