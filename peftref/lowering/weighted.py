"""The edits of a linear: ``W1 = base -> add* -> rotate -> normalise of W``, and ``b1``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.ir.types import Stage
from peftref.lowering.fast import FastLinear
from peftref.lowering.matrix import fold_weight
from peftref.lowering.program import BoundEdit, gather_rows, scatter_rows
from peftref.lowering.weight import dense_weight, is_plain_linear
from peftref.passes.check_rules import overlap, turns_slices

__all__ = ["WeightFold"]

Call = Callable[[Tensor], Any]


class WeightFold:
    """What is done to one weight, formed or as maps of the stream, by ops or one by one.

    Args:
        module: the linear (another module's tensors are edited by ``Fold.effective``).
        weights: the edits of its weight, in the order of the fold.
        biases: those of its bias; ``gated_biases``: those that a gate scales row by row.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: list[BoundEdit],
        biases: list[BoundEdit],
        gated_biases: list[BoundEdit],
    ) -> None:
        self.base = [e for e in weights if e.stage is Stage.WEIGHT_BASE]
        self._based: tuple[tuple[object, ...], Tensor] | None = None
        self._trained_base = any(
            spec.trainable for e in self.base for step in e.edit.program.steps
            for spec in step.primitive.tensors()
        )
        if self.base and not is_plain_linear(module):
            raise BackboneError(
                f"{self.base[0].edit.write.site.label}: the weight of this {type(module).__name__} "
                "is quantised already; leave out the quantisation, or load it unquantised"
            )
        self.weights = [e for e in weights if e.stage is not Stage.WEIGHT_BASE]
        self.biases, self.gated_biases = biases, gated_biases
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
        plain = self.formed or gated or bool(self.base)
        self.fast = None if plain else FastLinear.of(module, self.weights)

    def run(self, module: nn.Module, call: Call, x: Tensor) -> Any:  # noqa: ANN401
        """``W1 x + b1``; ``call`` is the frozen module."""
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
        call: Call,
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
        self, module: nn.Module, call: Call, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Rotations of slices: the rows of each once more, with the change of its stream."""
        y, bias = self._start(module, call, x, bias, split_bias=False)
        weight = self.frozen(module).to(x.dtype)
        for edit in self.weights:
            rows = gather_rows(weight, edit.rows, 0)
            change = torch.nn.functional.linear(edit.stream(x) - x, rows)
            y = y + scatter_rows(change, edit.rows)
        return y if bias is None else y + bias

    def _start(
        self,
        module: nn.Module,
        call: Call,
        x: Tensor,
        bias: Tensor | None,
        *,
        split_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The frozen product, and the bias that is still to be added."""
        if not split_bias and not self.biases and not self.base:
            return call(x), None
        if is_plain_linear(module):
            weight = self.frozen(module)
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

    def weight(self, module: nn.Module) -> Tensor:
        """``W1`` (d_out, d_in): the folded weight, formed."""
        return self._fold_weight(module, self.weights)

    def _fold_weight(self, module: nn.Module, edits: list[BoundEdit]) -> Tensor:
        return fold_weight(self.frozen(module), edits)

    def frozen(self, module: nn.Module) -> Tensor:
        """What the trained edits start from: the weight, or its map by an edit of the base.

        Kept until the weight changes, since it would be the same in every forward, unless the
        map is trained itself (a mask).
        """
        weight = dense_weight(module)
        if not self.base:
            return weight
        if self._trained_base:
            return fold_weight(weight, self.base).to(weight.dtype)
        if self._based is not None and torch.compiler.is_compiling():
            return self._based[1]
        key = (id(module._parameters["weight"]), weight._version, weight.dtype, weight.device)
        if self._based is None or self._based[0] != key:
            with torch.no_grad():
                self._based = key, fold_weight(weight, self.base).to(weight.dtype)
        return self._based[1]

    def bias(self, module: nn.Module) -> Tensor | None:
        """``b1``: the folded bias."""
        bias: Tensor | None = getattr(module, "bias", None)
        for edit in self.biases:
            if bias is None:
                raise TypeError(f"{edit.edit.write.label}: the module has no bias")
            bias = bias + scatter_rows(edit.matrix(None, bias.dtype), edit.rows)
        return bias


def _refuse_two_norms(norms: list[BoundEdit]) -> None:
    """Of two adapters; within one plan the passes refuse it."""
    for first, second in itertools.combinations(norms, 2):
        one, two = first.edit.write.site, second.edit.write.site
        if one.expert == two.expert and one.tensor == two.tensor and overlap(one.rows, two.rows):
            raise BackboneError(
                f"{first.edit.write.label}: two adapters normalise this weight, so that the "
                "magnitude of the first would have no effect; detach or disable one of them"
            )


def _is_narrow(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is None or weight.dtype not in (torch.float32, torch.float64)


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)
