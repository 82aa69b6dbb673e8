"""The task head alone on the frozen backbone: the floor that every composition is compared to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.errors import ArtifactError, TrainingError
from peftref.ir.plan import PlannedTensor

__all__ = ["HEAD_RATE", "HeadOnly"]

HEAD_RATE = 1e-2


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
    planned: Mapping[str, PlannedTensor] = {}

    def __init__(self, model: PreTrainedModel, head_modules: Iterable[str]) -> None:
        self.model = model
        self.handled = True
        self.optimiser: Any = None
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
        rate = HEAD_RATE if lr is None else lr
        return [{"params": list(self.head.values()), "lr": rate, "weight_decay": weight_decay}]

    def rate(self, tensor: Tensor) -> float:
        """No procedure asks: there is none."""
        raise TrainingError("a head alone has no procedures")

    def tensors(self, members: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
        """Return nothing: there is no adapter."""
        del members
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: there is no adapter."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take nothing back."""
        if state:
            raise TrainingError(f"no composition is attached that has {next(iter(state))!r}")

    def load_head(self, head: Mapping[str, Tensor]) -> None:
        """Take task-head tensors back.

        Raises:
            ArtifactError: the model's head is another one.
        """
        if {n: t.shape for n, t in head.items()} != {n: t.shape for n, t in self.head.items()}:
            raise ArtifactError(
                f"head tensors {', '.join(sorted(head))} do not fit this model's head: "
                f"{', '.join(sorted(self.head))}; load the backbone with the same task and labels"
            )
        with torch.no_grad():
            for name, value in head.items():
                self.head[name].copy_(value)

    def prepare(self, batches: Iterable[Any]) -> None:
        """Do nothing: there is no procedure."""

    def begin_phase(self, phase: str, batches: Iterable[Any]) -> None:
        """Do nothing: there is no procedure."""

    def rest(self, names: Collection[str]) -> None:
        """Do nothing: the head alone trains."""

    def detach(self) -> None:
        """Let parameters train as they did before."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._before[name])
