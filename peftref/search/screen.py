"""Screening on the meta device: exact counts and every refusal, before a weight is loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from peftref.backbone.hf import meta_model, site_table
from peftref.backbone.names import resolve_backbone
from peftref.compiler import compile_table
from peftref.errors import PeftRefError
from peftref.search.settings import SearchRun
from peftref.search.study import Screen, Screened
from peftref.spec import load
from peftref.training.data import load_data
from peftref.training.tasks.base import task_of

__all__ = ["BackboneScreen"]


class BackboneScreen(Screen):
    """Compiles candidates for the backbone of a run.

    Raises:
        BackboneError: the backbone cannot be read.
        DataError: the data set cannot be read.
    """

    def __init__(self, run: SearchRun) -> None:
        self._table = site_table(_skeleton(run), run.sites)
        self._servable = run.search.servable
        self.layers = max(self._table.layers.values())
        self.parameters = self._table.frozen_parameters

    def __call__(self, expression: str | None) -> Screened:
        """Return the plan's parameters; a refusal of the compiler is the problem."""
        if expression is None:
            return Screened(0)
        try:
            plan = compile_table(load(expression), self._table)
        except PeftRefError as error:
            return Screened(0, str(error))
        for target in self._servable:
            blockers = plan.servable.get(target, (f"unknown form {target!r}",))
            if blockers:
                problem = f"not servable as {target}: {blockers[0]}"
                return Screened(plan.trainable_parameters, problem)
        return Screened(plan.trainable_parameters)


def _skeleton(run: SearchRun) -> PreTrainedModel:
    """Return the model that a worker will load, with all its shapes and no weights."""
    data = load_data(run.data, run.task)
    task, source = task_of(data.columns.task), resolve_backbone(run.backbone)
    model = meta_model(source, task.head, task.outputs(data.label_names))
    task.shape(model, run.pooling, source, trained_pooler=True)
    return model
