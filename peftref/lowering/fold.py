"""The meaning of all edits of one module: a left fold, used by forward and merge.

    x1 = input edits of x
    W1 = add* -> rotate -> normalise of W
    y1 = W1 x1 + b1 + parallel writes
    y2 = output edits of y1
    then the writes of spans that end at this module (a whole sub-layer's parallel and output)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftref.backbone.site_table import RowSlice, SiteKind
from peftref.ir.types import Stage
from peftref.lowering.matrix import Matrices
from peftref.lowering.program import BoundEdit, gather_rows, scatter_rows
from peftref.lowering.weighted import WeightFold
from peftref.spec.typology import Port

__all__ = ["Carried", "Fold", "Slot"]

Base = Callable[..., Any]


@dataclass(slots=True)
class Carried:
    """The first argument of an enclosing module with another of its arguments, on its way in."""

    value: Tensor
    read: Tensor


@dataclass(slots=True)
class Slot:
    """What the first linear of a sub-layer read, until the last one of the same call takes it.

    Only where a sub-layer is neither a module nor handed its input as an argument (OPT, BART).
    """

    value: Tensor | None = None

    def take(self) -> Tensor | None:
        """Give the tensor away: nothing is held between calls."""
        value, self.value = self.value, None
        return value

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # what a failed call left behind is no part of a copy


class Fold:
    """The active edits of one module, ready to run.

    Args:
        module: the backbone module.
        edits: in the order of the plan, of all active adapters.
        argument: name of the first parameter of the module's forward.
        carries: name of the argument that this module hands in to the module it encloses.
        puts: where to leave what this module reads, for the end of the sub-layer that it begins.
        takes: where to find what the begin of the sub-layer that ends here has read.
    """

    def __init__(
        self,
        module: nn.Module,
        edits: list[BoundEdit],
        argument: str,
        carries: str | None = None,
        puts: tuple[Slot, ...] = (),
        takes: Slot | None = None,
    ) -> None:
        self.argument = argument
        self.carries = carries
        self.puts, self.takes = puts, takes
        self.prefix_rows = 0
        self.of_stack = [e for e in edits if e.edit.write.read is Port.HIDDEN_STATES]
        self.streams = [e for e in edits if e.stage is Stage.STREAMS]
        apart = {id(e) for e in (*self.of_stack, *self.streams)}
        edits = [e for e in edits if id(e) not in apart]
        own = [e for e in edits if not _is_span(e)]
        self.linear = any(e.edit.write.site.kind is SiteKind.LINEAR for e in own)
        self.inputs = [e for e in own if e.stage is Stage.INPUT]
        weights = [e for e in own if e.stage.on_weight]
        self.weights = sorted(weights, key=lambda e: e.stage)
        self.biases = [e for e in own if e.stage is Stage.BIAS and not e.gated]
        self.gated_biases = [e for e in own if e.stage is Stage.BIAS and e.gated]
        # Of a module that is no linear: the whole module runs once more for each of them.
        self.gated_own = [] if self.linear else [e for e in own if e.gated and (
            e.stage is Stage.BIAS or e.stage.on_weight)]
        self._running: BoundEdit | None = None
        self.parallel = [e for e in own if e.stage is Stage.PARALLEL]
        self.outputs = [e for e in own if e.stage is Stage.OUTPUT]
        self.prefixes = [e for e in own if e.stage is Stage.KEYS_VALUES]
        self.tokens = [e for e in own if e.stage is Stage.TOKENS]
        self.spans = [e for e in edits if _is_span(e)]
        self.matrices = Matrices(
            [e for e in (*self.weights, *self.biases) if _is_matrix(e)])
        self.on_weight = WeightFold(module, self.weights, self.biases, self.gated_biases)

    def run(self, module: nn.Module, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401, E501
        """Run the module's forward ``base`` with the edits."""
        x, rest, kwargs = self._take(args, kwargs)
        if self.tokens:
            return self._prompted(module, base, x)
        carried = None
        if isinstance(x, Carried):
            x, carried = x.value, x.read
        for slot in self.puts:
            slot.value = x
        prefix = None
        if self.prefixes:
            from peftref.lowering.prefix import insert_prefix, own_forward

            base = own_forward(self.prefixes) or base
            prefix, rest, kwargs = insert_prefix(module, self.prefixes, x, rest, kwargs)
            self.prefix_rows = prefix.keys.shape[2]

        def call(stream: Tensor) -> Any:  # noqa: ANN401 - whatever the module returns
            if self.carries is not None:
                # In with the first argument, to the module that this one encloses.
                read = kwargs[self.carries] if self.carries in kwargs else rest[0]
                return base(module, Carried(stream, read), *rest, **kwargs)
            return base(module, stream, *rest, **kwargs)

        slices: dict[RowSlice, Tensor] = {}
        for edit in self.inputs:
            if edit.rows is not None:
                slices[edit.rows] = edit.join_whole(slices.get(edit.rows, x))
                continue
            slices = {rows: self._edited(module, call, edit, s) for rows, s in slices.items()}
            x = self._edited(module, call, edit, x)
        result = self._weighted(module, call, x)
        if prefix is not None:
            from peftref.lowering.prefix import refuse_unused

            refuse_unused(prefix, self.prefixes)
        y = self._sliced(module, x, slices, _first(result))
        carried = carried if self.takes is None else self.takes.take()
        return _replace_first(result, self._after(x, y, carried))

    def _edited(
        self, module: nn.Module, call: Callable[[Tensor], Any], edit: BoundEdit, x: Tensor
    ) -> Tensor:
        """The input stream after one input edit."""
        own = edit.edit.write.read is Port.INPUT
        read = x if own else _first(self._weighted(module, call, x))
        return edit.onto(x, read)

    def _prompted(self, module: nn.Module, base: Base, ids: Tensor) -> Tensor:
        """Ids from the vocabulary's size on stand for learned rows."""
        vocabulary: int = module.num_embeddings  # pyright: ignore[reportAssignmentType]
        y: Tensor = base(module, ids.clamp(max=vocabulary - 1))
        parts = [edit.rows_of_tokens(y) for edit in self.tokens]  # (l, d), or (batch, l, d)
        batch = [ids.shape[0]] if any(part.dim() > 2 for part in parts) else []
        rows = torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)
        virtual = (ids - vocabulary).clamp(min=0)
        own = rows[torch.arange(len(ids), device=ids.device)[:, None], virtual] if batch else (
            rows[virtual])
        y = torch.where((ids >= vocabulary)[..., None], own, y)
        for edit in self.outputs:
            y = edit.onto(y, y)
        return y

    def _after(self, x: Tensor, y: Tensor, carried: Tensor | None) -> Tensor:
        for edit in self.parallel:
            y = edit.onto(y, x)
        for edit in self.outputs:
            y = edit.onto(y, _read(edit, x, gather_rows(y, edit.rows)))
        for edit in self.spans:
            looks = edit.stage is Stage.PARALLEL or edit.edit.write.looks_back
            if not looks:
                y = edit.onto(y, y)
            elif carried is None:
                raise TypeError(f"{edit.edit.write.label}: the span's input did not arrive")
            else:
                y = edit.onto(y, _read(edit, carried, y))
        return y

    def _take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        if args:
            return args[0], args[1:], dict(kwargs)
        kwargs = dict(kwargs)
        return kwargs.pop(self.argument), (), kwargs

    def _weighted(self, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> Any:  # noqa: ANN401
        if self.gated_own:
            return self._gated_module(call, x)
        if not self.linear or not (self.weights or self.biases or self.gated_biases):
            return call(x)
        return self.on_weight.run(module, call, x)

    def _gated_module(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:  # noqa: ANN401
        """``y + sum of g (y with the edit - y)`` for gated edits of a norm's own tensors."""
        result = call(x)
        y = whole = _first(result)
        for edit in self.gated_own:
            self._running = edit
            try:
                y = y + edit.gate(x) * (_first(call(x)) - whole)
            finally:
                self._running = None
        return _replace_first(result, y)

    def _sliced(
        self, module: nn.Module, x: Tensor, slices: dict[RowSlice, Tensor], y: Tensor
    ) -> Tensor:
        """An input edit of one slice is an extra product with the rows of that slice."""
        if not slices:
            return y
        weight = self.weight(module).to(x.dtype)
        for rows, stream in slices.items():
            change = torch.nn.functional.linear(stream - x, gather_rows(weight, rows, 0))
            y = y + scatter_rows(change, rows)
        return y

    def weight(self, module: nn.Module) -> Tensor:
        """``W1`` (d_out, d_in): the folded weight, formed."""
        return self.on_weight.weight(module)

    def bias(self, module: nn.Module) -> Tensor | None:
        """``b1``: the folded bias."""
        return self.on_weight.bias(module)

    def effective(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a module that is no linear, with its trained difference."""
        if any(name == _windows(e) for e in self.prefixes):
            # Every query sees the prefix, however narrow the window of its layer is.
            return torch.nn.functional.pad(tensor, (self.prefix_rows, 0) * 2, value=True)
        if self.matrices:
            return self.matrices.effective(name, tensor)
        edits = self.biases if name == "bias" else [
            e for e in self.weights if e.stage is Stage.WEIGHT_ADD
        ]
        edits = [e for e in edits if not e.gated]
        running = self._running
        if running is not None and (running.stage is Stage.BIAS) == (name == "bias"):
            edits.append(running)
        for edit in edits:
            tensor = tensor + edit.matrix(None, tensor.dtype)
        return tensor


def _windows(edit: BoundEdit) -> str | None:
    shape = edit.edit.write.site.attention
    return shape.cache.windows if shape is not None and shape.cache is not None else None


def _is_matrix(edit: BoundEdit) -> bool:
    return edit.edit.write.site.kind is SiteKind.MATRIX


def _is_span(edit: BoundEdit) -> bool:
    return edit.edit.write.ends_a_span


def _read(edit: BoundEdit, x: Tensor, y: Tensor) -> Tensor:
    """What an edit behind the module reads, with ``x`` its input and ``y`` its output so far."""
    if edit.edit.write.read is Port.BOTH:
        return torch.cat((x, y), -1)
    return x if edit.stage is Stage.PARALLEL or edit.edit.write.looks_back else y


def _first(result: Any) -> Tensor:  # noqa: ANN401 - a tensor, or a tuple that starts with one
    return result[0] if isinstance(result, tuple) else result


def _replace_first(result: Any, y: Tensor) -> Any:  # noqa: ANN401
    return (y, *result[1:]) if isinstance(result, tuple) else y
