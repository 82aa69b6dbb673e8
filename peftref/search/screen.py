"""Screening on the meta device: exact counts and every refusal, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from peftref.backbone.hf import meta_model, site_table
from peftref.backbone.hf.traits import read_traits
from peftref.backbone.names import resolve_backbone
from peftref.compiler import compile_table
from peftref.errors import PeftRefError
from peftref.ir.memory import Step, step_memory
from peftref.ir.plan import Plan
from peftref.search.settings import SearchRun
from peftref.search.study import Screen, Screened
from peftref.spec import load
from peftref.training.data import TaskData, load_data
from peftref.training.session import length_limit
from peftref.training.tasks.base import task_of

__all__ = ["BackboneScreen"]


class BackboneScreen(Screen):
    """Compiles candidates for the backbone of a run.

    Raises:
        BackboneError: the backbone cannot be read.
        DataError: the data set cannot be read.
    """

    def __init__(self, run: SearchRun) -> None:
        data = load_data(run.data, run.task)
        self._model = _skeleton(run, data)
        self._table = site_table(self._model, run.sites)
        self._servable = run.search.servable
        self._traits = read_traits(self._model, task_of(data.columns.task).head)
        length = length_limit(run.max_length, self._model.config)
        self._step = Step(run.batch_size, length, run.dtype, _device(run.device))
        self.rows: Mapping[str, int] = {
            name: len(data.split(name)) for name in ("train", "validation")
        }
        self.layers = max(self._table.layers.values())
        self.parameters = self._table.frozen_parameters

    def __call__(self, expression: str | None) -> Screened:
        """Return the plan's parameters; a refusal of the compiler is the problem."""
        if expression is None:
            return Screened(0)
        try:
            plan = self._plan(expression)
        except PeftRefError as error:
            return Screened(0, str(error))
        for target in self._servable:
            blockers = plan.servable.get(target, (f"unknown form {target!r}",))
            if blockers:
                problem = f"not servable as {target}: {blockers[0]}"
                return Screened(plan.trainable_parameters, problem)
        memory = step_memory(plan, self._traits, self._step).peak
        return Screened(plan.trainable_parameters, memory=memory)

    def seconds(self, expression: str) -> float:
        """Return the seconds of a usual training step, measured on random weights."""
        from peftref.training.timing import time_steps

        return time_steps(self._model, self._plan(expression), self._traits, self._step).step

    def _plan(self, expression: str) -> Plan:
        tokens = self._step.batch * self._step.length
        return compile_table(load(expression), self._table, tokens=tokens, dtype=self._step.dtype)


def _device(name: str | None) -> str:
    """Name the kernels that a training will run: those of a CPU, or those of a GPU."""
    return "cpu" if (name or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu" else "h100"


def _skeleton(run: SearchRun, data: TaskData) -> PreTrainedModel:
    """Return the model that a worker will load, with all its shapes and no weights."""
    task, source = task_of(data.columns.task), resolve_backbone(run.backbone)
    model = meta_model(source, task.head, task.outputs(data.label_names))
    task.shape(model, run.pooling, source, trained_pooler=True)
    return model
