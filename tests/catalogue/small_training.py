"""A few steps of real training on a tiny BERT, for techniques with procedures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

import peftref
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.encode import Collator
from tests.training.assets import bert_folder
from tests.training.test_trainer import ROWS, arguments

__all__ = ["adapted", "train"]

_FOLDER: list[Path] = []


def adapted(spec: Any, seed: int = 0, **known: Any) -> Any:
    """Return a composition attached to a tiny classifier with fixed weights."""
    if not _FOLDER:
        _FOLDER.append(bert_folder(Path(tempfile.mkdtemp()) / "bert", dropout=0.0))
    head = TaskHead("classification", ("a", "b", "c"))
    torch.manual_seed(0)
    model = load_backbone(str(_FOLDER[0]), head, dtype="float32", device="cpu").model
    return peftref.attach(model, spec, seed=seed, **known)


def train(spec: Any, output: Path, *, steps: int = 4, base: type[Trainer] | None = None,
          made: Any = None, resume: bool = False, callbacks: Any = (), **changes: Any) -> Any:
    """Attach, train and return the handle; ``base``: a trainer class to use as it is."""
    made = adapted(spec) if made is None else made
    kind = peftref.trainer(Trainer) if base is None else base
    extra = {"adapted": made} if base is None else {"model": made.model}
    settings = arguments(output, **{"max_steps": steps, **changes})
    trainer = kind(args=settings, train_dataset=ROWS * 4, data_collator=Collator(0), **extra)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return made
