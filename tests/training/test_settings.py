"""The run file: places of errors, what is laid over it, and what transformers takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftref.errors import SpecError
from peftref.training.arguments import training_arguments
from peftref.training.settings import EvaluationSettings, load_settings, settings_text

RUN = """backbone: somewhere
data: trec6
composition: lora(rank=4)
epochs: 2
arguments: {weight_decay: 1e-2}
"""


def test_flags_and_assignments_are_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    run = load_settings(
        path, {"seed": 3, "output": None}, ["steps=7", "data.limit=40", "arguments.adam_beta1=0.5"]
    )
    assert (run.seed, run.steps, run.epochs, run.output) == (3, 7, None, None)
    assert (run.data.source, run.data.limit) == ("trec6", 40)
    assert run.arguments == {"weight_decay": 0.01, "adam_beta1": 0.5}
    again = tmp_path / "again.yaml"
    again.write_text(settings_text(run))
    assert load_settings(again) == run


@pytest.mark.parametrize(("text", "assignments", "message"), [
    (RUN + "evaluation:\n  att: 3\n", [], r"run.yaml:7:3: Unknown field.*'att'. Did you mean 'at'"),
    (RUN + "batch_size: -1\n", [], r"run.yaml:6:13: batch_size: .*greater"),
    (RUN, ["steps"], "name=value"),
    (RUN, ["composition.rank=3"], "names a field inside 'lora"),
    ("data: trec6\n", [], "field 'backbone' is missing"),
    (RUN + "steps: 3\n", [], "'steps' or 'epochs', not both"),
    (RUN, ["evaluation.at=[2.0]"], "fractions of the run"),
])
def test_wrong_settings_are_named(
    tmp_path: Path, text: str, assignments: list[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_settings(path, {}, assignments)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("weight_decy", 0.1, "Did you mean 'weight_decay'"),
    ("learning_rate", 0.1, "set 'learning_rate' of the run"),
    ("per_device_train_batch_size", 4, "set 'batch_size'"),
    ("load_best_model_at_end", True, "decides this itself"),
    ("lr_scheduler_type", "linaer", "arguments"),
])
def test_training_arguments_are_checked(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    run = load_settings(None, {"backbone": "b", "data": "trec6", "arguments": {name: value}})
    with pytest.raises(SpecError, match=message):
        training_arguments(run, tmp_path, rate=1e-3, seed=0, steps=3)


def test_evaluation_always_ends_with_the_last_step() -> None:
    assert EvaluationSettings(every=4).steps(10) == {4, 8, 10}
    assert EvaluationSettings(at=(0.25, 0.5)).steps(10) == {3, 5, 10}
    assert EvaluationSettings(at=()).steps(1) == {1}
