"""The meaning of all edits of one module: a left fold, used by forward and merge.

    x1 = input edits of x
    W1 = add* -> rotate -> normalise of W
    y1 = W1 x1 + b1 + parallel writes
    y2 = output edits of y1
    then the writes of spans that end at this module (a whole sub-layer's parallel and output)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftref.backbone.site_table import RowSlice, SiteKind
from peftref.errors import BackboneError
from peftref.ir.types import Stage
from peftref.lowering.fast import FastLinear
from peftref.lowering.program import BoundEdit, gather_rows, scatter_rows
from peftref.lowering.weight import dense_weight, is_plain_linear
from peftref.passes.check_rules import overlap, turns_slices
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
        edits = [e for e in edits if e.edit.write.read is not Port.HIDDEN_STATES]
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
        self.formed = any(e.edit.formed for e in self.weights)
        draws = any(e.draws or e.gated for e in self.weights)
        self.turns_slices = bool(self.weights) and turns_slices(
            [e.edit.write for e in self.weights])
        must_form = any(e.edit.write.must_form for e in self.weights) and not self.turns_slices
        if self.formed and (draws or _is_narrow(module)):
            # W + dW in 16 bits would round a small dW away; as maps of the stream it is kept.
            self.formed = False
        self.formed = self.formed or must_form
        if self.formed and draws:
            raise BackboneError(
                f"{self.weights[0].edit.write.site.label}: one adapter has dropout, another needs "
                "the weight to be formed, where dropout would be lost; set dropout to 0"
            )
        _refuse_two_norms([e for e in self.weights if e.stage is Stage.WEIGHT_NORM])
        gated = any(e.gated for e in self.weights)
        self.fast = None if self.formed or gated else FastLinear.of(module, self.weights)

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
        rows = torch.cat([edit.rows_of_tokens(y) for edit in self.tokens], -2)
        virtual = (ids - vocabulary).clamp(min=0)
        y = torch.where((ids >= vocabulary)[..., None], rows[virtual], y)
        for edit in self.outputs:
            y = edit.onto(y, y)
        return y

    def _after(self, x: Tensor, y: Tensor, carried: Tensor | None) -> Tensor:
        for edit in self.parallel:
            y = edit.onto(y, x)
        for edit in self.outputs:
            y = edit.onto(y, gather_rows(y, edit.rows))
        for edit in self.spans:
            if edit.stage is Stage.PARALLEL:
                if carried is None:
                    raise TypeError(f"{edit.edit.write.label}: the span's input did not arrive")
                y = edit.onto(y, carried)
            else:
                y = edit.onto(y, y)
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
        if self.formed:
            weight = self.weight(module).to(x.dtype)
            return torch.nn.functional.linear(x, weight, _as(self.bias(module), x))
        gated = [e for e in self.weights if e.gated]
        y = self._factored(module, call, x, [e for e in self.weights if not e.gated])
        if gated:
            # A normalisation has no change of its own to scale: with and without are compared.
            whole = self._factored(module, call, x, self.weights)
            y = y + gated[-1].gate(x) * (whole - y)
        for edit in self.gated_biases:
            y = y + edit.gate(x) * scatter_rows(edit.matrix(None, y.dtype), edit.rows)
        return y

    def _factored(
        self,
        module: nn.Module,
        call: Callable[[Tensor], Any],
        x: Tensor,
        weights: list[BoundEdit],
    ) -> Any:  # noqa: ANN401 - whatever the module returns
        """``W1 x + b1`` without forming ``W1``."""
        bias = self.bias(module)
        if self.fast is not None:
            return self.fast(module, x, bias)
        if self.turns_slices:
            return self._turned(module, call, x, bias)
        normalises = any(e.stage is Stage.WEIGHT_NORM for e in weights)
        streams: list[Tensor] = []
        for edit in reversed(weights):
            streams.append(x)
            if edit.stage is Stage.WEIGHT_ROTATE:
                x = edit.stream(x)
        streams.reverse()
        y, bias = self._start(module, call, x, bias, split_bias=normalises)
        for index, (edit, stream) in enumerate(zip(weights, streams, strict=True)):
            if edit.stage is Stage.WEIGHT_ADD:
                y = edit.join(y, edit.stream(stream)) if edit.gated else edit.onto(y, stream)
            elif edit.stage is Stage.WEIGHT_NORM:
                y = y * self._row_scale(module, edit, weights[:index]).to(y.dtype)
        return y if bias is None else y + bias

    def _turned(
        self, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Rotations of slices: the rows of each once more, with the change of its stream."""
        y, bias = self._start(module, call, x, bias, split_bias=False)
        weight = dense_weight(module).to(x.dtype)
        for edit in self.weights:
            rows = gather_rows(weight, edit.rows, 0)
            change = torch.nn.functional.linear(edit.stream(x) - x, rows)
            y = y + scatter_rows(change, edit.rows)
        return y if bias is None else y + bias

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

    def _start(
        self,
        module: nn.Module,
        call: Callable[[Tensor], Any],
        x: Tensor,
        bias: Tensor | None,
        *,
        split_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The frozen product, and the bias that is still to be added."""
        if not split_bias and not self.biases:
            return call(x), None
        if is_plain_linear(module):
            weight = dense_weight(module)
            if split_bias:
                return torch.nn.functional.linear(x, weight), _as(bias, x)
            return torch.nn.functional.linear(x, weight, _as(bias, x)), None
        frozen = getattr(module, "bias", None)
        y = call(x)
        return (y if frozen is None else y - frozen), _as(bias, x)

    def _row_scale(
        self, module: nn.Module, edit: BoundEdit, before: list[BoundEdit]
    ) -> Tensor:
        """``m / ||W||`` of the weight before this edit; the norm carries no gradient."""
        with torch.no_grad():
            weight = gather_rows(self._fold_weight(module, before), edit.rows, 0)
        scale = edit.row_scale(weight)
        return scale if edit.rows is None else 1 + scatter_rows(scale - 1, edit.rows)

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
        return self._fold_weight(module, self.weights)

    def _fold_weight(self, module: nn.Module, edits: list[BoundEdit]) -> Tensor:
        weight = dense_weight(module)
        # An update below half a unit in the last place of a 16-bit weight would be lost.
        dtype = torch.promote_types(weight.dtype, torch.float32) if edits else weight.dtype
        weight = weight.to(dtype)
        for edit in edits:
            if edit.stage is Stage.WEIGHT_ADD:
                weight = weight + scatter_rows(edit.matrix(None, dtype), edit.rows, 0)
                continue
            rows = gather_rows(weight, edit.rows, 0)
            if edit.stage is Stage.WEIGHT_ROTATE:
                new = rows @ edit.matrix(None, dtype)
            else:
                new = edit.matrix(rows, dtype)
            weight = new if edit.rows is None else weight + scatter_rows(new - rows, edit.rows, 0)
        return weight

    def bias(self, module: nn.Module) -> Tensor | None:
        """``b1``: the folded bias."""
        bias: Tensor | None = getattr(module, "bias", None)
        for edit in self.biases:
            if bias is None:
                raise TypeError(f"{edit.edit.write.label}: the module has no bias")
            bias = bias + scatter_rows(edit.matrix(None, bias.dtype), edit.rows)
        return bias

    def effective(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a module that is no linear, with its trained difference."""
        if any(name == _windows(e) for e in self.prefixes):
            # Every query sees the prefix, however narrow the window of its layer is.
            return torch.nn.functional.pad(tensor, (self.prefix_rows, 0) * 2, value=True)
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


def _refuse_two_norms(norms: list[BoundEdit]) -> None:
    """Of two adapters; within one plan the passes refuse it."""
    for first, second in itertools.combinations(norms, 2):
        if overlap(first.rows, second.rows):
            raise BackboneError(
                f"{first.edit.write.label}: two adapters normalise this weight, so that the "
                "magnitude of the first would have no effect; detach or disable one of them"
            )


def _is_narrow(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is None or weight.dtype not in (torch.float32, torch.float64)


def _windows(edit: BoundEdit) -> str | None:
    shape = edit.edit.write.site.attention
    return shape.cache.windows if shape is not None and shape.cache is not None else None


def _is_span(edit: BoundEdit) -> bool:
    return edit.edit.write.ends_a_span


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def _first(result: Any) -> Tensor:  # noqa: ANN401 - a tensor, or a tuple that starts with one
    return result[0] if isinstance(result, tuple) else result


def _replace_first(result: Any, y: Tensor) -> Any:  # noqa: ANN401
    return (y, *result[1:]) if isinstance(result, tuple) else y
