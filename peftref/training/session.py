"""Backbone, tokenizer and data loaded once; any number of runs on them, each from the start."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peftref
from peftref.backbone import hf
from peftref.errors import TrainingError
from peftref.training.arguments import check_names, training_arguments
from peftref.training.backbone import HeadState, TaskHead, load_backbone
from peftref.training.data import load_data
from peftref.training.encode import Collator, Encoded, encode, training_order
from peftref.training.floor import HeadOnly
from peftref.training.metrics import main_metric, score
from peftref.training.run import Progress, Run, SessionTrainer
from peftref.training.scoring import score_rows
from peftref.training.settings import RunSettings, settings_text
from peftref.training.trainer import Trained, last_checkpoint

__all__ = ["FitResult", "Progress", "TrainingSession"]

IDENTITY = "run.json"


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run came to.

    Attributes:
        metrics: of the validation split, at the last evaluation.
        loss: of the validation split.
        score: the main metric, more is better.
        trainable_parameters: of the composition, without the head.
        steps: optimiser steps done, those before a resume included.
        seconds: wall time of this call.
        stopped: whether it was ended early.
        artifact: where it was saved; None when stopped or not asked for.
    """

    metrics: Mapping[str, float]
    loss: float
    score: float
    trainable_parameters: int
    steps: int
    seconds: float
    stopped: bool
    artifact: Path | None


class TrainingSession:
    """Loads everything that runs share.

    Args:
        settings: the run file; its composition, rate, seed and length are defaults of `fit`'s.
        on_step: told steps done and in all after every step, for a progress display.

    Raises:
        DataError, BackboneError, SpecError: something of the settings cannot be had.
    """

    def __init__(
        self, settings: RunSettings, *, on_step: Callable[[int, int], None] | None = None
    ) -> None:
        check_names(settings.arguments)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.on_step = on_step
        self.data = load_data(settings.data, settings.task)
        self.task = self.data.columns.task
        self.metric = main_metric(self.task, settings.evaluation.metric)
        head = TaskHead(self.task, self.data.label_names, settings.pooling)
        self.backbone = load_backbone(
            settings.backbone, head, dtype=settings.dtype, device=settings.device
        )
        self.model, self.tokenizer = self.backbone.model, self.backbone.tokenizer
        heads = hf.head_modules(self.model)
        names = [name for name, _ in self.model.named_parameters() if name.split(".")[0] in heads]
        self._head = HeadState(self.model, names, self.backbone.fresh)
        self.max_length = _length_limit(settings.max_length, self.model.config)
        self.collate = Collator(
            self.tokenizer.pad_token_id, regression=self.task == "regression"
        )
        self._encoded: dict[str, Encoded] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about data, head and cut rows, as sentences."""
        cut = [
            f"{encoded.truncated} of {len(encoded.rows)} {name} rows are cut to {self.max_length} "
            "tokens" for name, encoded in self._encoded.items() if encoded.truncated
        ]
        return (*self.data.notes, *self.backbone.notes, *cut)

    def encoded(self, split: str) -> Encoded:
        """Return a split as tokens; the work is done once."""
        if split not in self._encoded:
            examples = self.data.split(split)
            self._encoded[split] = encode(
                examples, self.tokenizer, self.data.columns, self.max_length
            )
        return self._encoded[split]

    def evaluate(self, adapted: Trained, split: str) -> dict[str, float]:
        """Return loss and metrics of a split.

        Raises:
            DataError: there is no such split.
        """
        size = self.settings.evaluation.batch_size
        return score_rows(
            adapted.model, self.encoded(split).rows, self.collate, self.task, size
        )
