"""Time and memory of contestants that take turns; needs torch only."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Contestant", "Measured", "measure"]

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Contestant:
    """A model, the ids of a step, and the optimiser of what trains in it."""

    model: nn.Module
    inputs: Tensor
    optimiser: torch.optim.Optimizer | None

    def forward(self) -> Tensor:
        """Return the loss: the mean square of the last hidden state."""
        hidden = self.model(input_ids=self.inputs).last_hidden_state
        return hidden.float().square().mean()

    def step(self) -> None:
        """Forward, backward, optimiser."""
        self.forward().backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Measured:
    """What one process found of a contestant.

    Attributes:
        ratio: least time of a step over that of the frozen step.
        saved_mib: what autograd keeps for the backward pass, each storage once.
        peak_mib: memory at its highest in a step, over that before it.
    """

    ratio: float
    saved_mib: float
    peak_mib: float


def measure(
    contestants: Mapping[str, Contestant], rounds: int, clock: str
) -> dict[str, Measured]:
    """Let all take turns, in an order that is turned each round.

    Args:
        contestants: one is named ``frozen``; ratios are taken to it.
        rounds: steps of each that are timed.
        clock: ``cpu`` (time of the process, which other programs disturb less) or ``wall``.
    """
    saved = {name: saved_mib(each) for name, each in contestants.items()}
    peaks: dict[str, float] = {}
    for name, each in contestants.items():
        each.step()  # states of the optimiser, buffers of the libraries
        peaks[name] = peak_mib(each)
    best = dict.fromkeys(contestants, float("inf"))
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 else reversed(names):
            best[name] = min(best[name], seconds(contestants[name], clock))
    floor = best["frozen"]
    return {name: Measured(best[name] / floor, saved[name], peaks[name]) for name in contestants}


def seconds(contestant: Contestant, clock: str) -> float:
    """Return the time of one step."""
    cuda = contestant.inputs.is_cuda
    now: Callable[[], float] = time.process_time
    if cuda or clock == "wall":
        now = time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    begun = now()
    contestant.step()
    if cuda:
        torch.cuda.synchronize()
    return now() - begun


def saved_mib(contestant: Contestant) -> float:
    """Return MiB that autograd keeps between forward and backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in contestant.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contestant.forward()
    total = sum(kept.values()) / MIB
    del loss
    return total


def peak_mib(contestant: Contestant) -> float:
    """Return how much memory a step needs over what is held before it; NaN where unknown."""
    gc.collect()
    if contestant.inputs.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text("5")  # the highest value so far is forgotten
        before = _resident("VmRSS")
        contestant.step()
        return (_resident("VmHWM") - before) / MIB
    except (OSError, AttributeError, KeyError):
        return float("nan")


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
