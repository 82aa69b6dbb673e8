"""One typed run file: what to train, on what, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from peftref.backbone.family import Family, read_family
from peftref.errors import SpecError
from peftref.spec.base import Frozen, Scalar
from peftref.spec.loader import DEEPEST, Node, node_of, parse_value, read_yaml, to_text, validated

__all__ = [
    "DataSettings",
    "EvaluationSettings",
    "Pooling",
    "RunSettings",
    "Task",
    "load_model",
    "load_settings",
    "settings_text",
]

Model = TypeVar("Model", bound=Frozen)
Task = Literal[
    "auto", "classification", "regression", "multilabel", "token_classification",
    "multiple_choice", "image_classification", "similarity", "retrieval", "seq2seq", "causal_lm",
]
Pooling = Literal["auto", "mean", "cls", "model"]


def _listed(value: Any) -> Any:  # noqa: ANN401 - the loader's border
    """One name stands for a list of it."""
    return (value,) if isinstance(value, str) else value


class DataSettings(Frozen):
    """Where the rows are and which columns mean what.

    ``source`` is a csv, tsv, json, jsonl or parquet file, a folder of such files named train,
    validation (or dev) and test, a folder of pictures in folders named for their class, the
    embedded ``trec6`` or ``digits``, or a name that `datasets` knows (``owner/name`` or
    ``owner/name:configuration``). Columns that are not given are inferred; which a task takes says
    docs/tasks.md. ``separator`` cuts a text into labels. A row in which something is missing is an
    error, or left out with ``drop_missing``.
    The fractions are taken from the training rows where the source has no such split; a test
    split is taken only when the source has neither. ``limit`` keeps that many training rows.
    """

    source: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    target: str | None = None
    image: str | None = None
    choices: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    separator: str | None = Field(default=None, min_length=1)
    drop_missing: bool = False
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=0.5)
    test_fraction: float = Field(default=0.1, ge=0.0, lt=0.5)
    seed: int = 0
    limit: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        return {"source": value} if isinstance(value, str) else value


class EvaluationSettings(Frozen):
    """When the validation split is scored: every so many steps, or at fractions of the run.

    The last step is always scored. ``metric`` is the one that a run is judged by; None: the
    task's default.
    """

    every: int | None = Field(default=None, ge=1)
    at: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    batch_size: int = Field(default=64, ge=1)
    metric: str | None = None

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        wrong = [fraction for fraction in self.at if not 0.0 < fraction <= 1.0]
        if wrong:
            raise ValueError(f"'at' takes fractions of the run in (0, 1], not {wrong[0]}")
        return self

    def steps(self, total: int) -> frozenset[int]:
        """Return the steps after which to evaluate a run of ``total`` steps."""
        if self.every is not None:
            return frozenset({*range(self.every, total + 1, self.every), total})
        return frozenset({max(1, math.ceil(fraction * total)) for fraction in self.at} | {total})


def _row(value: Any) -> Any:  # noqa: ANN401 - the loader's border
    """Read the file, so that what is saved with a run stays right when the file changes."""
    return read_family(Path(value).expanduser()) if isinstance(value, str) else value


class RunSettings(Frozen):
    """Everything that determines a training run.

    ``sites`` is the site row of the backbone or the path of its file; None takes the built-in one
    of its type or infers it.
    ``learning_rate`` None takes each technique's own default; ``head_learning_rate`` None is 0.01
    for a new head on pooled vectors and else the composition's. ``composition`` None trains the
    task head alone. ``arguments`` sets any field of transformers' ``TrainingArguments`` that
    has no name of its own here. ``steps`` and ``epochs`` exclude each other; without both, a
    run takes three epochs. ``threads`` limits torch's threads in this process.
    """

    backbone: str
    sites: Annotated[
        Family | None, BeforeValidator(_row, json_schema_input_type=Family | str | None)
    ] = None
    data: DataSettings
    composition: str | Mapping[str, Any] | None = None
    task: Task = "auto"
    pooling: Pooling = "auto"
    learning_rate: float | None = Field(default=None, gt=0.0)
    head_learning_rate: float | None = Field(default=None, gt=0.0)
    steps: int | None = Field(default=None, ge=1, le=10_000_000)
    epochs: float | None = Field(default=None, gt=0.0, le=100_000.0)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    max_length: int = Field(default=128, ge=2)
    seed: int = Field(default=0, ge=0, lt=1 << 32)  # what every library's generator takes
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    threads: int | None = Field(default=None, ge=1, le=4096)
    evaluation: EvaluationSettings = EvaluationSettings()
    output: str | None = None
    arguments: Mapping[str, Scalar | Mapping[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give 'steps' or 'epochs', not both")
        return self

    def total_steps(self, rows: int) -> int:
        """Return the number of optimiser steps on ``rows`` training rows."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 3.0) * rows / self.batch_size))


def load_settings(
    path: Path | None, flags: Mapping[str, object] | None = None, assignments: Sequence[str] = ()
) -> RunSettings:
    """Return the run file of one training; see `load_model`."""
    return load_model(RunSettings, path, flags, assignments)


def load_model(
    model: type[Model], path: Path | None, flags: Mapping[str, object] | None = None,
    assignments: Sequence[str] = (),
) -> Model:
    """Return a run file with flags and then ``a.b=value`` assignments laid over it.

    Args:
        model: what the file holds.
        path: a YAML run file; None: everything comes from the other two.
        flags: dotted field names and values; None values count as not given.
        assignments: what stood after ``--set``; values are read as YAML.

    Raises:
        SpecError: a field is unknown or its value is wrong, with its place in the file.
    """
    root = read_yaml(path) if path is not None else Node({})
    for name, value in (flags or {}).items():
        if value is not None:
            root = _laid_over(root, name.split("."), value, name)
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or not all(name.strip().split(".")):
            raise SpecError(f"--set takes name=value with a dotted name, not {text!r}")
        root = _laid_over(root, name.strip().split("."), parse_value(value), text)
    return validated(model, root)


def _laid_over(node: Node, way: Sequence[str], value: object, source: str) -> Node:
    """Return ``node`` with ``value`` at the dotted way; ``steps`` and ``epochs`` replace."""
    if not way:
        return node_of(value)
    if len(way) > DEEPEST:
        raise SpecError(f"{source[:60]!r} names a field more than {DEEPEST} levels deep")
    if not node.is_mapping:
        raise SpecError(f"{source!r} names a field inside {node.value!r}, which has none")
    content: dict[str, Node] = dict(node.value)
    content.pop({"steps": "epochs", "epochs": "steps"}.get(way[0], ""), None)
    inner = content.get(way[0], Node({}))
    if way[0] == "data" and len(way) > 1 and isinstance(inner.value, str):
        # `data: trec6` is short for `data: {source: trec6}`, so a field may be laid over it.
        inner = Node({"source": inner}, inner.mark)
    content[way[0]] = _laid_over(inner, way[1:], value, source)
    return node.replaced(content)


def settings_text(settings: RunSettings) -> str:
    """Return the settings as the YAML of a run file; reading it gives them back."""
    return to_text(settings.model_dump(mode="json", exclude_none=True))
