"""Edits that an op computes at once, as the plan says; the plain program is their definition.

``PEFTREF_OPS=reference`` leaves all of them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftref.ir.types import Stage
from peftref.lowering.group import Group, Member
from peftref.lowering.weight import dense_weight, takes_ops
from peftref.ops.block_rotate.op import block_rotate
from peftref.ops.bottleneck.op import bottleneck
from peftref.ops.choice import FORCED
from peftref.ops.delta_rownorm.op import delta_rownorm
from peftref.ops.dora_linear.op import dora_linear
from peftref.ops.lora_linear.op import lora_linears
from peftref.ops.rotated_linear.op import rotated_linear
from peftref.ops.scale_shift.op import scale_shift

if TYPE_CHECKING:
    from peftref.lowering.program import BoundEdit

__all__ = ["FastLinear", "fast_join"]

_CHILD = "peftref"  # state.CHILD, which imports this
Join = Callable[[Tensor, Tensor], Tensor]


class FastLinear:
    """``W1 x + b1`` of a plain linear whose edits run with the frozen product.

    =====================================  =====================================================
    edits                                  op
    =====================================  =====================================================
    low-rank additions                     lora_linear; additions of other kinds follow one by one
    the same, and norms                    dora_linear, delta_rownorm
    rotations only                         rotated_linear, after block_rotate for all but the last
    low-rank additions, rotations          block_rotate, then as without
    =====================================  =====================================================

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
        self.scale = Constant(self.thin[0].scale if len(self.thin) == 1 else 1.0)
        self._squares: tuple[object, Tensor] | None = None

    @classmethod
    def of(cls, module: nn.Module, weights: list[BoundEdit]) -> FastLinear | None:
        """The fast form for these edits; None where the plain one is to run."""
        fast = cls(weights)
        sliced = any(e.rows is not None for e in fast.rotations)
        if FORCED or sliced or not takes_ops(module):
            return None
        if fast.norms:
            known = all(e.edit.write.op == "dora_linear" for e in fast.norms)
            drawn = any(e.draws for e in fast.thin)
            if not known or drawn or fast.others or fast.rotations or len(fast.norms) > 1:
                return None
        turned = fast.rotations and not fast.others
        turned = turned and all(e.edit.write.op == "rotated_linear" for e in fast.rotations)
        return fast if fast.thin or turned else None

    def __call__(self, module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Run the frozen product with all edits."""
        weight = dense_weight(module)
        for edit in self.rotations if self.thin else self.rotations[:-1]:
            known = edit.edit.write.op == "rotated_linear"
            x = block_rotate(x, edit.operand()) if known else edit.stream(x)
        if self.only_thin and (group := state_group(module)) is not None:
            found = self._grouped(group, module, x, bias)
            if found is not None:
                return found
        if not self.thin:
            return rotated_linear(x, self.rotations[-1].operand(), weight, bias)
        down, up = self.factors()
        scale = self.scale.on(x.device)
        if self.norms:
            ratio = self._ratio(weight, down, up, scale)
            return dora_linear(x, weight, bias, down, up, scale, ratio)
        biases = [] if bias is None else [bias]
        p = self.thin[0].dropout
        (y,) = lora_linears(x, [weight], biases, [down], [up], [scale], p)
        for edit in self.others:
            y = edit.onto(y, x)
        return y

    @property
    def only_thin(self) -> bool:
        """Whether low-rank additions are all there is."""
        return bool(self.thin) and not (self.norms or self.others or self.rotations)

    def _grouped(
        self, group: Group, module: nn.Module, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """The result as a member of a group; None where the group does not work."""
        found = group.take(module, x)
        if found is not None or not group.works:
            return found
        members = [Member(module, self, bias)]
        for other in group.modules:
            if other is module or not hasattr(other, _CHILD):
                continue
            fold = getattr(other, _CHILD).fold(other)
            if fold is None or fold.inputs or fold.on_weight.fast is None:
                continue
            members.append(Member(other, fold.on_weight.fast, fold.bias(other)))
        return group.run(members, x) if len(members) > 1 else None

    def factors(self) -> tuple[Tensor, Tensor]:
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


class Constant:
    """A number as a tensor, made once a device: as a number, each new one compiles ops anew."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._held: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The tensor ()."""
        if torch.compiler.is_compiling():
            return torch.full((), self.value, dtype=torch.float64, device=device)
        if device not in self._held:
            with torch.inference_mode(mode=False):
                self._held[device] = torch.full((), self.value, dtype=torch.float64, device=device)
        return self._held[device]


def state_group(module: nn.Module) -> Group | None:
    """The group of a swapped linear."""
    state = module._modules.get(_CHILD)
    return None if state is None else state.__dict__.get("group")


def fast_join(edit: BoundEdit) -> Join | None:
    """Return what joins a stream and an edit by one op: ``(stream, read) -> stream``."""
    return None if FORCED or edit.edit.write.op not in _JOINS else _JOINS[edit.edit.write.op](edit)


def _rescaled(edit: BoundEdit) -> Join:
    def join(_: Tensor, x: Tensor) -> Tensor:
        (vector,) = edit.linear_tensors()
        vector = vector if edit.scale == 1.0 else vector * edit.scale
        # Measured: on a CPU torch's own product and sum are a little faster than the op.
        return x * vector.to(x.dtype) if x.device.type == "cpu" else scale_shift(x, vector)

    return join


def _bottleneck(edit: BoundEdit) -> Join:
    scale = Constant(edit.scale)
    (activation,) = (
        str(p.link.value) for p in edit.links if p.link is not None and p.link.kind == "activation"
    )

    def join(y: Tensor, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = edit.linear_tensors()
        same = y is x
        return bottleneck(
            x, down, down_bias, up, up_bias, activation, scale.on(x.device),
            into=None if same else y, residual=same,
        )  # fmt: skip

    return join


_JOINS: dict[str, Callable[[BoundEdit], Join]] = {
    "scale_shift": _rescaled,
    "bottleneck": _bottleneck,
}
