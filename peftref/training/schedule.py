"""The learning-rate schedule of a training in phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from peftref.errors import TrainingError
from peftref.procedures.base import Phase

__all__ = ["joined_schedule"]


def joined_schedule(
    optimizer: Optimizer, phases: Sequence[Phase], parts: Sequence[LRScheduler]
) -> LambdaLR:
    """Return the schedules of the phases, one after the other.

    Args:
        optimizer: whose rates follow the schedule.
        phases: in order; each multiplies its schedule by its own rate.
        parts: a schedule for each, beginning at its step 0.

    Raises:
        TrainingError: a schedule depends on more than the step.
    """
    schedules: list[LambdaLR] = []
    for part in parts:
        if not isinstance(part, LambdaLR):
            raise TrainingError(
                f"phases start the schedule anew, which {type(part).__name__} cannot; take one "
                "that depends on the step alone: constant, linear, cosine or polynomial"
            )
        schedules.append(part)

    def of_group(group: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            index = max(i for i, phase in enumerate(phases) if phase.start <= step)
            phase = phases[index]
            return phase.rate * schedules[index].lr_lambdas[group](step - phase.start)

        return factor

    return LambdaLR(optimizer, [of_group(i) for i in range(len(optimizer.param_groups))])
