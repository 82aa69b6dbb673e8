"""How many of the lower layers go without adapters is drawn in every step."""

from __future__ import annotations

import random

from pydantic import Field

from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

__all__ = ["DropLayersArguments", "DropLayersProcedure", "dropped_layers"]


class DropLayersArguments(ProcedureArguments):
    """As the coupling ``drop_layers``; ``members``: comma-separated."""

    members: str
    most: int = Field(ge=1)


@procedures.register("drop_layers")
class DropLayersProcedure(Procedure[DropLayersArguments]):
    """``k`` uniform in 0 .. ``most``, drawn in every step.

    The draw depends on the number of the step only, so that all processes and a resumed run
    agree. AdapterDrop, Rueckle et al. 2021, https://arxiv.org/abs/2010.11918
    """

    name = "drop_layers"
    Arguments = DropLayersArguments

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        for name, tensor in adapter.tensors(tuple(self.arguments.members.split(","))).items():
            if name.endswith("drop.first_layer"):
                tensor.fill_(dropped_layers(step, self.arguments.most))


def dropped_layers(step: int, most: int) -> int:
    """Return how many layers go without in ``step``."""
    return random.Random(f"drop_layers:{step}").randint(0, most)
