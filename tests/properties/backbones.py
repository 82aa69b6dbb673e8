"""Backbones and drawn compositions that the property tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import reject, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import peftref
from peftref.adapted import Adapted
from peftref.backbone.hf import site_table
from peftref.backbone.site_table import SiteTable
from peftref.compiler import compile_table
from peftref.errors import TrainingError
from peftref.testing.strategies import Composed, Printer, compositions
from tests.backbone.tiny import Task, inputs, tiny

__all__ = ["TASKS", "Case", "attached", "batch", "cases", "examples", "fresh", "model", "output",
           "snapshot", "table"]

TASKS: dict[str, Task] = {"bert": "classification", "gpt2": "causal_lm", "llama": "causal_lm",
                          "t5": "seq2seq_lm"}


def examples(count: int) -> settings:
    """Return settings for ``count`` examples in the usual profile, more in a larger one."""
    usual = 100  # Hypothesis' own default, which the usual profile keeps
    return settings(max_examples=max(1, count * settings().max_examples // usual))


@dataclass(frozen=True, repr=False)
class Case:
    """A backbone family and a composition for it."""

    family: str
    composed: Composed

    def __repr__(self) -> str:
        return f"# {self.family}\n{self.composed!r}"

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:
        printer.text(repr(self))


def cases(*families: str, **options: Any) -> st.SearchStrategy[Case]:
    """Return a strategy of cases over some families (default: all)."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        family = draw(st.sampled_from(families or tuple(TASKS)))
        return Case(family, draw(compositions(table(family), **options)))

    return case()


@cache
def table(family: str) -> SiteTable:
    return site_table(model(family, torch.float32))


def fresh(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> PreTrainedModel:
    return tiny(family, TASKS[family], dtype=dtype, seed=seed)


@cache
def model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """One model for all examples: attaching and detaching must leave it as it was."""
    return fresh(family, dtype)


def batch(family: str, **options: Any) -> dict[str, Tensor]:
    return inputs(family, TASKS[family], **options)


def snapshot(backbone: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()}


def output(backbone: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return backbone(**given).logits


@contextmanager
def attached(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Iterator[Adapted]:
    """Attach to the shared model and detach after; a failed example leaves a fresh model."""
    backbone = model(case.family, dtype)
    plan = compile_table(case.composed.spec, table(case.family))
    adapted = peftref.attach(backbone, plan, **options)
    try:
        adapted.handled = True
        adapted.special_tokens = batch(case.family)["input_ids"][0, :2].tolist()
        _prepare(case.family, adapted)
        yield adapted
        adapted.detach()
    except BaseException:
        model.cache_clear()
        raise


def _prepare(family: str, adapted: Adapted) -> None:
    if not adapted.plan.properties.needs_data:
        return
    try:
        adapted.prepare([{**batch(family), "labels": _labels(family)}])
    except TrainingError:  # rectified units that are off for the whole batch have no scores
        adapted.detach()
        reject()


def _labels(family: str) -> Tensor:
    given = batch(family)
    match TASKS[family]:
        case "classification":
            return torch.arange(len(given["input_ids"])) % 3
        case "seq2seq_lm":
            return given["decoder_input_ids"]
        case _:
            return given["input_ids"]
