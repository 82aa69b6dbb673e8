"""The task head alone on the frozen backbone: the floor that every composition is compared to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.errors import TrainingError

__all__ = ["HeadOnly"]

RATE = 1e-3


class HeadOnly:
    """Stands where an attached composition does, with nothing attached.

    Args:
        model: its backbone is frozen until `detach`.
        head_modules: paths of the modules of the task head.

    Raises:
        TrainingError: the model has no task head.
    """

    name = "none"
    trainable: Mapping[str, nn.Parameter] = {}
    procedures: tuple[Any, ...] = ()

    def __init__(self, model: PreTrainedModel, head_modules: Iterable[str]) -> None:
        self.model = model
        self.handled = True
        roots = set(head_modules)
        self.head = {
            name: parameter for name, parameter in model.named_parameters()
            if name.split(".")[0] in roots
        }
        if not self.head:
            raise TrainingError(
                f"{type(model).__name__} has no task head of its own, so there is nothing to train "
                "without a composition"
            )
        self._before = {name: each.requires_grad for name, each in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.head)

    def parameter_groups(
        self, lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return the head as one group."""
        rate = RATE if lr is None else lr
        return [{"params": list(self.head.values()), "lr": rate, "weight_decay": weight_decay}]

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: there is no adapter."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take nothing back."""
        if state:
            raise TrainingError(f"no composition is attached that has {next(iter(state))!r}")

    def detach(self) -> None:
        """Let parameters train as they did before."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._before[name])
