"""Times steps of an attached composition on a model of random weights: time needs shapes only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from peftref.backbone.hf import quiet
from peftref.compiler import attach
from peftref.errors import BackboneError
from peftref.ir.memory import Step, Traits
from peftref.ir.plan import Plan

__all__ = ["Timing", "time_steps"]

STEPS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each timed step; the step before them, which compiles and allocates, is left out.

    Attributes:
        steps: forward, backward and optimiser.
    """

    steps: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a usual step."""
        return median(self.steps)


def time_steps(skeleton: PreTrainedModel, plan: Plan, traits: Traits, step: Step) -> Timing:
    """Time three steps on this machine.

    Args:
        skeleton: the model on the meta device, of which one with random weights is made.
        plan: compiled for it.
        traits: of it.
        step: the batch.

    Raises:
        BackboneError: there is not enough memory for it here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, step.dtype)
    try:
        with quiet():
            model: Any = type(skeleton)(skeleton.config)
            model = model.to(device, dtype).train()
        adapted = attach(model, plan)
        groups = adapted.parameter_groups(lr=1e-4)
        optimiser = torch.optim.AdamW(groups, fused=True)
        given = _batch(model, traits, step, device)
        found = [_timed(model, optimiser, given, device) for _ in range(1 + STEPS)]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise BackboneError(
            f"a step of {step.batch} x {step.length} tokens does not fit into the memory of this "
            f"{device}; give a smaller --batch"
        ) from error
    return Timing(tuple(found[1:]))


def _batch(
    model: Any, traits: Traits, step: Step, device: str  # noqa: ANN401
) -> dict[str, torch.Tensor]:
    if traits.tokens:
        size = model.config.image_size
        channels = getattr(model.config, "num_channels", 3)
        pixels = torch.randn(step.batch, channels, size, size, device=device, dtype=model.dtype)
        return {"pixel_values": pixels}
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(vocabulary // 2, vocabulary, (step.batch, step.length), device=device)
    given = {"input_ids": ids}
    if traits.vocabulary_loss:
        given["labels"] = ids
    elif model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given


def _timed(model: Any, optimiser: Any, given: dict[str, torch.Tensor], device: str) -> float:  # noqa: ANN401
    begun = time.perf_counter()
    result = model(**given)
    loss = result["loss"] if "labels" in given else result[0].float().mean()
    del result
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
