"""Run settings as transformers' ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from peftref.errors import SpecError, unknown_name
from peftref.training.settings import RunSettings

__all__ = ["training_arguments"]

# Fields of TrainingArguments that a run file says in its own words.
OWNED = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "save_strategy": "evaluation.every",
    "save_steps": "evaluation.every",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "device",
}
# A run orders its rows and keeps its checkpoints in a way that these would break.
FIXED = (
    "load_best_model_at_end", "train_sampling_strategy", "length_column_name", "data_seed",
    "ignore_data_skip", "save_only_model", "save_total_limit", "eval_on_start", "eval_delay",
    "remove_unused_columns", "disable_tqdm", "push_to_hub", "auto_find_batch_size",
    "num_train_epochs", "label_names", "dataloader_drop_last",
)
DEFAULTS: Mapping[str, object] = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
    "report_to": "none",
    "logging_steps": 50,
    # A loss that is not a number is an error here, never averaged away.
    "logging_nan_inf_filter": False,
}


def training_arguments(
    settings: RunSettings, folder: Path, *, rate: float, seed: int, steps: int
) -> TrainingArguments:
    """Return the arguments of a run that keeps its checkpoints under ``folder``.

    Raises:
        SpecError: ``arguments`` has an unknown field, one that the run file owns, or a bad value.
    """
    check_names(settings.arguments)
    if settings.device is not None and settings.device.partition(":")[2] not in ("", "0"):
        raise SpecError(
            f"device {settings.device!r}: a training takes the first visible device; choose which "
            "that is with CUDA_VISIBLE_DEVICES"
        )
    values: dict[str, Any] = {
        **DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **settings.arguments
    }
    values |= _given(settings) | {
        "output_dir": str(folder), "max_steps": steps, "seed": seed, "learning_rate": rate,
    }
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise SpecError(f"arguments: {error}") from error
    if arguments.n_gpu > 1:
        # One process trains on one device; transformers would spread batches over all of them.
        arguments._n_gpu = 1  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return arguments


def _given(settings: RunSettings) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.evaluation.batch_size,
        "eval_strategy": "no",
        "save_strategy": "no",
        "save_total_limit": 2,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # The rows come in the order of training; one epoch is the whole run.
        "train_sampling_strategy": "sequential",
        "use_cpu": settings.device == "cpu",
    }


def check_names(arguments: Mapping[str, object]) -> None:
    """Raise for names that ``TrainingArguments`` lacks or that the run file says otherwise."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in arguments:
        if name in OWNED:
            raise SpecError(f"arguments.{name}: set {OWNED[name]!r} of the run instead")
        if name in FIXED:
            raise SpecError(f"arguments.{name}: a run decides this itself")
        if name not in known:
            free = known - set(OWNED) - set(FIXED)
            raise SpecError(f"arguments: {unknown_name('training argument', name, free)}")
