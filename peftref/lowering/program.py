"""Run the flat program of an edit, on the stream or on matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftref.backbone.site_table import RowSlice
from peftref.ir.edits import EditPlan, Program
from peftref.ir.pattern import low_rank
from peftref.lowering.fast import fast_join
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


class _Gate:
    """The program of a gate, run on what the edit reads."""

    def __init__(
        self, program: Program, runtime: Runtime, fetch: tuple[Callable[[], Tensor], ...]
    ) -> None:
        self._fetch = fetch[len(fetch) - len(program.tensors) :]
        self._forms = tuple(step.primitive.bind(runtime) for step in program.steps)
        self._inputs = tuple(step.inputs for step in program.steps)
        self._result = program.result

    def __call__(self, x: Tensor) -> Tensor:
        registers = [x, *(fetch().to(x.dtype) for fetch in self._fetch)]
        for form, inputs in zip(self._forms, self._inputs, strict=True):
            registers.append(form(*[registers[i] for i in inputs]))
        return registers[self._result]


class _AtSite:
    """A runtime that knows which rows of the weight a site has."""

    def __init__(self, runtime: Runtime, rows: RowSlice | None) -> None:
        self._runtime, self._rows = runtime, rows

    @property
    def training(self) -> bool:
        return self._runtime.training

    def token_mask(self, stack: str) -> Tensor | None:
        return self._runtime.token_mask(stack)

    def weight(self) -> Tensor:
        return gather_rows(self._runtime.weight(), self._rows, 0)

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._runtime.keys_values(rows)


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
        self._runtime = runtime
        runtime = _AtSite(runtime, self.rows)
        self.scale = (edit.write.scale if edit.write.scale is not None else 1.0) * scale
        self._fetch = fetch[: len(edit.program.tensors)]
        self._result = edit.program.result
        self._inputs = tuple(step.inputs for step in edit.program.steps)
        self._gate = None if edit.gate is None else _Gate(edit.gate, runtime, fetch)
        steps = edit.program.steps
        self.links = [s.primitive for s in steps if not s.primitive.on_tensors]
        self._fast = fast_join(self)
        # A first step without tensors (a fold of the stream) does not know the type of its result.
        self._needs_identity = any(
            step.inputs == (0,) and not step.primitive.reads_weight for step in steps
        )
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

    @property
    def apart(self) -> bool:
        """Whether attention over these rows is a sum beside that over the sequence."""
        return self.kind is not IntegrationKind.CONCAT

    @property
    def reads_weight(self) -> bool:
        """Whether some primitive of it asks for the module's frozen weight."""
        return any(step.primitive.reads_weight for step in self.edit.program.steps)

    @property
    def gated(self) -> bool:
        """Whether a gate scales the change that it makes."""
        return self._gate is not None

    def gate(self, x: Tensor) -> Tensor | float:
        """What scales the change; 1 without a gate."""
        return 1.0 if self._gate is None else self._gate(x)

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` joined by ``s f(x)``; a last product adds into ``y`` by itself."""
        if self._gate is not None:
            gate = self._gate(x)
            if self.kind in _ADDS:
                return self.join(y, gate * self.stream(x))
            return y + gate * (self.join(y, self.stream(x)) - y)
        if self._fast is not None:
            return self._fast(y, x)
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
        rows = self.stream(like)
        return rows if self._gate is None else self._gate(like) * rows

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

    @property
    def dropout(self) -> float:
        """Share of the input's entries that a low-rank edit drops now."""
        thin = low_rank(self.links)
        return thin.dropout if thin is not None and self._runtime.training else 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (r, d_in) and ``B`` (d_out, r) of a low-rank edit, in the type of its tensors.

        The rows of ``B`` that a slice does not have are zeros; scales are left out.
        """
        thin = low_rank(self.links)
        if thin is None:
            raise TypeError(f"{self.edit.write.label}: is not of low rank")
        registers: list[Tensor | None] = [None, *(fetch() for fetch in self._fetch)]
        ends: list[Tensor] = []
        link, value = 0, None
        for form, step in zip(self._matrix, self.edit.program.steps, strict=True):
            if step.primitive.on_tensors:
                registers.append(form(*[registers[i] for i in step.inputs]))
                continue
            if link == thin.split and value is not None:
                ends.append(value)
                value = None
            held = [registers[i] for i in step.inputs[1:]]
            value = value if link < thin.start else form(value, *held)
            registers.append(None)
            link += 1
        if value is None:
            raise TypeError(f"{self.edit.write.label}: the program gave nothing")
        return ends[0], scatter_rows(value, self.rows, 0)

    def operand(self) -> Tensor:
        """What the op of a function of one link takes: the blocks of a rotation."""
        return self.links[0].bind_operand()(*self.linear_tensors())

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
        value = self.stream(x)
        if self._gate is not None:
            value = self._gate(x) * (value if self.kind in _ADDS else value - x)
            return x + value
        return x + value if self.kind in _ADDS else value

    def join_matrix(self, before: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix of a sequential edit joined to its stream, applied to ``before``."""
        value = self.matrix(before, dtype)
        return before + value if self.kind in _ADDS else value

    def join(self, stream: Tensor, value: Tensor) -> Tensor:
        """Join ``value`` to ``stream`` by the integration kind."""
        if self.kind in _ADDS:
            return stream + scatter_rows(value, self.rows)
        write = self.edit.write
        beside = write.insertion.value == "parallel" or write.read is not write.port
        if self.kind is IntegrationKind.RESCALE and beside:
            value = gather_rows(stream, self.rows) * value
        if self.rows is None:
            return value
        return stream + scatter_rows(value - gather_rows(stream, self.rows), self.rows)
