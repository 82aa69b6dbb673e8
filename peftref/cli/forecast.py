"""What a training step of a plan holds and takes, for ``peftref show``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peftref.cli.style import count, memory, print_table, print_text
from peftref.ir.memory import Step, step_memory
from peftref.ir.step_flops import step_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftref.ir.plan import Plan

__all__ = ["forecast", "print_forecast"]

_PARTS = {
    "weights": "weights of the backbone",
    "adapter": "tensors of the adapter",
    "gradients": "gradients",
    "optimiser": "optimiser moments",
    "activations": "kept for the backward pass",
    "temporaries": "temporaries when it begins",
}


def forecast(
    model: PreTrainedModel, plan: Plan, task: str, step: Step, *, rows: int | None, timed: bool
) -> dict[str, Any]:
    """Return memory, FLOPs and, if ``timed``, time of a step and of an epoch of ``rows`` rows."""
    from peftref.backbone.hf.traits import read_traits

    traits = read_traits(model, task)
    held = step_memory(plan, traits, step)
    forward, backward = step_flops(plan, traits, step)
    found: dict[str, Any] = {
        "step": {**asdict(step), "length": traits.tokens or step.length},
        "memory": {**asdict(held), "peak": held.peak},
        "flops": {"forward": forward, "backward": backward},
    }
    if timed:
        from peftref.training.timing import time_steps

        timing = time_steps(model, plan, traits, step)
        steps = math.ceil(rows / step.batch) if rows else None
        found["time"] = {
            "steps": list(timing.steps),
            "step": timing.step,
            "steps_an_epoch": steps,
            "epoch": steps * timing.step if steps else None,
        }
    return found


def print_forecast(found: Mapping[str, Any] | None) -> None:
    """Print what `forecast` found; None: nobody asked."""
    if found is None:
        return
    step, held = found["step"], found["memory"]
    print_text(f"\na step of {step['batch']} x {step['length']} tokens in {step['dtype']} on "
               f"{step['device']}")
    rows = [(text, memory(held[name])) for name, text in _PARTS.items()]
    print_table(("part", "predicted"), [*rows, ("peak", memory(held["peak"]))],
                right=("predicted",))
    flops = found["flops"]
    print_text(f"compute     {count(flops['forward'])} FLOPs forward, {count(flops['backward'])} "
               "backward")
    if "time" in found:
        time = found["time"]
        text = f"time        {time['step']:.3g} s a step, measured here over {len(time['steps'])}"
        if time["epoch"] is not None:
            text += f"; {time['epoch']:,.0f} s an epoch of {time['steps_an_epoch']:,} steps"
        print_text(text)
