"""Linears of one layer that read one stream: one op computes them all when the first is called.

Query, key and value, gate and up. The stream is read once for all down-projections, and its
gradient is written once. The others find their result when they are called with the same tensor.
Compilers do not see this: they get one op for each linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftref.ir.plan import Plan
from peftref.lowering.weight import dense_weight
from peftref.ops.lora_linear.op import lora_linears

if TYPE_CHECKING:
    from peftref.lowering.fast import FastLinear

__all__ = ["Group", "Member", "join_groups"]

_TRIES = 8  # results that nobody took, until it is clear that nobody will


def join_groups(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Let the linears of each group of a plan know it; an older group of theirs grows.

    Args:
        plan: names the groups.
        modules: the swapped modules by path.
    """
    named: dict[str, list[nn.Module]] = {}
    for module_plan in plan.modules:
        for name in {edit.write.group for edit in module_plan.edits} - {""}:
            named.setdefault(name, []).append(modules[module_plan.path])
    for members in named.values():
        states = [vars(module._modules["peftref"]) for module in members]
        known = [state["group"] for state in states if state.get("group") is not None]
        group: Group = known[0] if known else Group()
        for module, state in zip(members, states, strict=True):
            state["group"] = group
            if module not in group.modules:
                group.modules.append(module)


class Member:
    """One linear of a group as it is now.

    Args:
        module: the linear.
        fast: its edits.
        bias: its folded bias.
    """

    def __init__(self, module: nn.Module, fast: FastLinear, bias: Tensor | None) -> None:
        self.module, self.fast, self.bias = module, fast, bias
        self.weight = dense_weight(module)

    def goes_with(self, first: Member) -> bool:
        """Whether one op can compute it together with ``first``."""
        plain = type(self.weight) in (Tensor, nn.Parameter)  # a shard is no whole weight
        return (
            plain
            and self.fast.only_thin
            and self.fast.thin[0].dropout == first.fast.thin[0].dropout
            and (self.bias is None) == (first.bias is None)
            and self.weight.device == first.weight.device
        )


class Group:
    """The linears, and the results that wait to be taken."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._held: tuple[Tensor, dict[int, Tensor]] | None = None
        self._lost = 0

    def __reduce__(self) -> tuple[type[Group], tuple[()], dict[str, object]]:
        # Results belong to a call, and are no part of a copy.
        return Group, (), {"modules": self.modules}

    def take(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The result for a linear, if it was computed from this very tensor."""
        if self._held is None or id(module) not in self._held[1]:
            return None
        read, results = self._held
        if read is not x or torch.compiler.is_compiling():
            self._lost, self._held = _TRIES, None  # they do not read one stream
            return None
        y = results.pop(id(module))
        if not results:
            self._held = None
        return y

    @property
    def works(self) -> bool:
        """Whether results are still computed ahead."""
        return self._lost < _TRIES and not torch.compiler.is_compiling()

    def run(self, members: list[Member], x: Tensor) -> Tensor:
        """Compute all; return the result of the first, keep the others."""
        if self._held is not None:
            self._lost += 1
        first = members[0]
        members = [first, *(m for m in members[1:] if m.goes_with(first))]
        factors = [m.fast.factors() for m in members]
        first_y, *others = lora_linears(
            x,
            [m.weight for m in members],
            [m.bias for m in members if m.bias is not None],
            [down for down, _ in factors],
            [up for _, up in factors],
            [m.fast.scale.on(x.device) for m in members],
            first.fast.thin[0].dropout,
        )
        waiting = {id(m.module): y for m, y in zip(members[1:], others, strict=True)}
        self._held = (x, waiting) if waiting else None
        return first_y
