"""Learning rate and weight decay of every trained tensor."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from peftref.errors import TrainingError
from peftref.spec.composition import CompositionSpec

if TYPE_CHECKING:
    from torch import nn

    from peftref.adapted import Adapted

__all__ = ["parameter_groups"]


def parameter_groups(
    adapted: Adapted, lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return what ``Adapted.parameter_groups`` says.

    Raises:
        TrainingError: no rate is given and a spec has none.
    """
    spec = adapted.plan.composition
    rates = {m.name: _rate(spec, m.name, lr) for m in spec.members}
    highest = max(rates.values())
    planned = adapted.planned
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in adapted.trainable.items():
        member, own = planned[name].member, planned[name].spec.rate
        ratio, decay = _group(spec, member, name, weight_decay)
        # What a coupling trains itself goes at the composition's rate.
        rate = rates.get(member, highest) * ratio * own
        groups.setdefault((rate, decay), []).append(parameter)
    head = list(adapted.head.values())
    if head:
        groups.setdefault((highest, weight_decay), []).extend(head)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _rate(spec: CompositionSpec, member: str, lr: float | None) -> float:
    if lr is not None:
        return lr
    for candidate in spec.members:
        if candidate.name == member and candidate.technique.learning_rate is not None:
            return candidate.technique.learning_rate.default
    raise TrainingError(f"{member}: its spec gives no learning rate; pass lr")


def _group(
    spec: CompositionSpec, member: str, name: str, weight_decay: float
) -> tuple[float, float]:
    for candidate in spec.members:
        if candidate.name != member:
            continue
        for group in candidate.technique.optimiser_groups:
            if fnmatchcase(name, f"*{group.match}"):
                decay = group.weight_decay
                return group.ratio, weight_decay if decay is None else decay
    return 1.0, weight_decay
