"""Edits that an op computes at once, as the plan says; the plain program is their definition.

``PEFTREF_OPS=reference`` leaves all of them out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftref.ir.types import Stage
from peftref.lowering.weight import dense_weight, takes_ops
from peftref.ops.choice import FORCED
from peftref.ops.delta_rownorm.op import delta_rownorm
from peftref.ops.dora_linear.op import dora_linear
from peftref.ops.lora_linear.op import lora_linears
from peftref.ops.scale_shift.op import scale_shift

if TYPE_CHECKING:
    from peftref.lowering.program import BoundEdit

__all__ = ["FastLinear", "fast_join"]

Join = Callable[[Tensor, Tensor], Tensor]


class FastLinear:
    """``W1 x + b1`` of a plain linear whose low-rank additions run with the frozen product.

    Additions that no op knows follow one by one, and rotations turn the stream before, as in the
    plain program.

    Args:
        weights: the edits of the weight, in the order of the fold; none of them gated.
    """

    def __init__(self, weights: list[BoundEdit]) -> None:
        self.rotations = [e for e in reversed(weights) if e.stage is Stage.WEIGHT_ROTATE]
        self.norms = [e for e in weights if e.stage is Stage.WEIGHT_NORM]
        adds = [e for e in weights if e.stage is Stage.WEIGHT_ADD]
        thin = [e for e in adds if e.edit.write.op == "lora_linear"]
        # Each draws a mask of its own: only one that draws can share the op.
        drawn = [e for e in thin if e.draws]
        self.thin = [e for e in thin if not e.draws] or drawn[:1]
        self.others = [e for e in adds if e not in self.thin]
        self._scales: dict[torch.device, Tensor] = {}
        self._squares: tuple[object, Tensor] | None = None

    @classmethod
    def of(cls, module: nn.Module, weights: list[BoundEdit]) -> FastLinear | None:
        """The fast form for these edits; None where the plain one is to run."""
        fast = cls(weights)
        sliced = any(e.rows is not None for e in fast.rotations)
        if FORCED or sliced or not fast.thin or not takes_ops(module):
            return None
        if fast.norms:
            known = all(e.edit.write.op == "dora_linear" for e in fast.norms)
            drawn = any(e.draws for e in fast.thin)
            if not known or drawn or fast.others or fast.rotations or len(fast.norms) > 1:
                return None
        return fast

    def __call__(self, module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Run the frozen product with all edits."""
        for edit in self.rotations:
            x = edit.stream(x)
        down, up = self._factors()
        scale = self._scale(x)
        weight = dense_weight(module)
        if self.norms:
            ratio = self._ratio(weight, down, up, scale)
            return dora_linear(x, weight, bias, down, up, scale, ratio)
        biases = [] if bias is None else [bias]
        p = self.thin[0].dropout
        (y,) = lora_linears(x, [weight], biases, [down], [up], [scale], p)
        for edit in self.others:
            y = edit.onto(y, x)
        return y

    def _factors(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of all low-rank additions, side by side."""
        pairs = [edit.factors() for edit in self.thin]
        if len(pairs) == 1:
            return pairs[0]
        ups = [up * edit.scale for (_, up), edit in zip(pairs, self.thin, strict=True)]
        return torch.cat([down for down, _ in pairs]), torch.cat(ups, 1)

    def _ratio(self, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        """``m / ||W1||``; the norm is a constant."""
        (magnitude,) = self.norms[0].linear_tensors()
        with torch.no_grad():
            norm = delta_rownorm(weight, down, up, scale, self._squared(weight, down))
        return magnitude / norm.to(magnitude.dtype)

    def _squared(self, weight: Tensor, down: Tensor) -> Tensor | None:
        """``||W||^2`` of every row, kept until the weight changes."""
        if torch.compiler.is_compiling() or weight.is_inference():
            return None
        wide = torch.promote_types(weight.dtype, down.dtype)
        wide = torch.promote_types(wide, torch.float32)
        key = (weight.data_ptr(), weight._version, weight.device, wide)
        if self._squares is None or self._squares[0] != key:
            with torch.inference_mode(mode=False):
                self._squares = key, weight.detach().to(wide).square().sum(1)
        return self._squares[1]

    def _scale(self, x: Tensor) -> Tensor:
        """The scale as a tensor: as a number, each new one would compile the op anew."""
        if torch.compiler.is_compiling():
            return self._made(x)
        if x.device not in self._scales:
            with torch.inference_mode(mode=False):
                self._scales[x.device] = self._made(x)
        return self._scales[x.device]

    def _made(self, x: Tensor) -> Tensor:
        scale = self.thin[0].scale if len(self.thin) == 1 else 1.0
        return torch.full((), scale, dtype=torch.float64, device=x.device)


def fast_join(edit: BoundEdit) -> Join | None:
    """Return what joins a stream and an edit by one op: ``(stream, read) -> stream``."""
    build = None if FORCED else _JOINS.get(edit.edit.write.op)
    return None if build is None else functools.partial(build, edit)


def _rescaled(edit: BoundEdit, _: Tensor, x: Tensor) -> Tensor:
    (vector,) = edit.linear_tensors()
    return scale_shift(x, vector if edit.scale == 1.0 else vector * edit.scale)


_JOINS: dict[str, Callable[[BoundEdit, Tensor, Tensor], Tensor]] = {"scale_shift": _rescaled}
