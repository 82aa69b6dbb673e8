"""Members that stand in some groups of layers only."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

from pydantic import Field, model_validator

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.registry import couplings

__all__ = ["Group", "GroupArguments", "group_of"]

Pattern = Literal["spindle", "increasing", "decreasing", "uniform", "bottleneck"]


class GroupArguments(CouplingArguments):
    """``groups``: the groups, numbered from 1 at the bottom, in which the members stand.

    ``of``: how many groups there are; ``pattern``: how their sizes go.
    """

    groups: tuple[int, ...] = Field(min_length=1)
    of: int = Field(default=4, gt=0)
    pattern: Pattern = "spindle"

    @model_validator(mode="after")
    def _exist(self) -> GroupArguments:
        wrong = [g for g in self.groups if not 1 <= g <= self.of]
        if wrong:
            raise ValueError(f"groups are numbered 1 to {self.of}, not {wrong[0]}")
        return self


@couplings.register("group")
class Group(Coupling[GroupArguments]):
    """The members' edits outside of the layers of some groups are left out.

    Groups are layers in a row; those of ``spindle`` are larger towards the middle. What lies
    outside of all layers is in no group. S4, Chen et al. 2023, https://arxiv.org/abs/2301.01821
    """

    name = "group"
    Arguments = GroupArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        a = self.arguments
        assigned = {name: group_of(count, a.of, a.pattern)
                    for name, count in graph.table.layers.items()}
        kept = dict.fromkeys(members, 0)
        left = 0
        for address, write in graph.writes(members):
            layer, groups = write.site.layer, assigned.get(write.site.stack, ())
            if layer is not None and groups[layer] in a.groups:
                kept[write.member] += 1
                continue
            graph.remove(address)
            left += 1
        for member, count in kept.items():
            if not count:
                raise CompositionError(
                    f"group: {member!r} has no edit in layers of groups "
                    f"{', '.join(map(str, a.groups))}; layers by group: {_shown(assigned)}"
                )
        graph.sweep()
        return f"{sum(kept.values())} edits in groups, {left} left out"


def group_of(layers: int, groups: int, pattern: str) -> tuple[int, ...]:
    """Return the group of each layer: of the one that holds the middle of the layer's share.

    The sizes of four groups go as 1 2 2 1 (spindle), 2 1 1 2 (bottleneck), 1 2 3 4, 4 3 2 1 or
    1 1 1 1.
    """
    numbers = range(1, groups + 1)
    inward = [min(i, groups + 1 - i) for i in numbers]
    sizes = {
        "uniform": [1] * groups,
        "increasing": list(numbers),
        "decreasing": list(reversed(numbers)),
        "spindle": inward,
        "bottleneck": [max(inward) + 1 - size for size in inward],
    }[pattern]
    ends, total = list(accumulate(sizes)), sum(sizes)
    # In whole numbers: (layer + 1/2) / layers < end / total.
    return tuple(
        1 + next(g for g, end in enumerate(ends) if (2 * layer + 1) * total < 2 * layers * end)
        for layer in range(layers)
    )


def _shown(assigned: dict[str, tuple[int, ...]]) -> str:
    return "; ".join(f"{stack} {list(groups)}" for stack, groups in assigned.items())
