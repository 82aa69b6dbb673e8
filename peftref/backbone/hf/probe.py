"""The row probe: which of query, key and value change with the weight rows of a projection."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.backbone.hf.modules import measure
from peftref.backbone.hf.trace import Attended, Trace, observe_attention, traced
from peftref.backbone.site_table import RowSlice

__all__ = ["PARTS", "Effect", "Part", "Probe"]

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class Effect:
    """What a perturbation did to one call of the attention interface.

    Attributes:
        reached: the parts of which anything changed.
        whole: the parts of which every column of every head changed.
    """

    reached: tuple[Part, ...]
    whole: tuple[Part, ...]


class Probe:
    """A model whose weights can be perturbed while its attention is observed.

    Args:
        model: random, and used for nothing else.
        inputs: of its forward.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self._log = observe_attention(model)
        self.trace = traced(model, self._log, inputs)

    def effects(self, path: str, rows: RowSlice | None = None) -> tuple[Effect, ...]:
        """Return what noise on the weight rows of a module does to each attention, in order."""
        with _perturbed(self.model.get_submodule(path), rows):
            after = traced(self.model, self._log, self.inputs, calls=False)
        if len(after.attended) != len(self.trace.attended):
            return ()
        return tuple(_effect(old, new) for old, new in
                     zip(self.trace.attended, after.attended, strict=True))

    def doubled(self, path: str, half: int | None = None) -> Trace:
        """Return a forward in which a module, or a half of its rows, gives twice what it does."""

        def twice(_module: nn.Module, _args: object, result: Tensor) -> Tensor:
            halves = list(result.chunk(2, -1))
            for i in range(2):
                halves[i] = halves[i] * (2 if half in (None, i) else 1)
            return torch.cat(halves, -1)

        handle = self.model.get_submodule(path).register_forward_hook(twice)
        try:
            return traced(self.model, self._log, self.inputs)
        finally:
            handle.remove()

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> Trace:
        """Return a forward of other inputs."""
        return traced(self.model, self._log, inputs)


def _effect(old: Attended, new: Attended) -> Effect:
    reached: list[Part] = []
    whole: list[Part] = []
    for part, before, after in zip(PARTS, old.parts, new.parts, strict=True):
        changed = (before != after).any(0).any(1)  # heads x width
        if changed.any():
            reached.append(part)
        if changed.all():
            whole.append(part)
    return Effect(tuple(reached), tuple(whole))


@contextmanager
def _perturbed(module: nn.Module, rows: RowSlice | None) -> Generator[None]:
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"{type(module).__name__} has no weight to perturb")
    kept = weight.detach().clone()
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(weight.shape, generator=generator)
    by_row = noise.T if measure(module).transposed else noise
    if rows is not None:
        grid = torch.arange(rows.groups * rows.size).view(rows.groups, rows.size)
        chosen = grid[:, rows.start : rows.start + rows.length].reshape(-1)
        keep = torch.zeros(len(by_row), dtype=torch.bool)
        keep[chosen] = True
        by_row[~keep] = 0.0
    try:
        with torch.no_grad():
            weight.add_(noise)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
