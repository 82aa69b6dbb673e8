"""Backbone, tokenizer and data loaded once; any number of runs on them, each from the start."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer_callback import PrinterCallback

from peftref.artifact import read
from peftref.backbone import hf
from peftref.backbone.family import families
from peftref.compiler import attach
from peftref.errors import ArtifactError, DeviceMemoryError, TrainingError
from peftref.spec import load
from peftref.spec.composition import CompositionSpec
from peftref.training.arguments import check_names, training_arguments
from peftref.training.backbone import HeadState, TaskHead, load_backbone
from peftref.training.data import load_data
from peftref.training.encode import Encoded, training_order
from peftref.training.floor import HEAD_RATE, HeadOnly
from peftref.training.metrics import main_metric, score
from peftref.training.publish import check_free, checkpoints_of
from peftref.training.restore import attached_artifact
from peftref.training.run import Progress, Run, SessionTrainer
from peftref.training.saving import save_artifact
from peftref.training.scoring import score_rows
from peftref.training.settings import RunSettings
from peftref.training.tasks.base import Setup, task_of
from peftref.training.trainer import Trained, last_checkpoint

__all__ = ["FitResult", "Order", "Progress", "TrainingSession"]

IDENTITY = "run.json"
# Settings that change where or how fast a run goes, not what it computes.
INCIDENTAL = ("output", "threads", "evaluation", "device")
# These count positions from the padding number on.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})


@dataclass(frozen=True, slots=True)
class Order:
    """What one run is asked to do, all defaults filled in."""

    composition: CompositionSpec | None
    learning_rate: float | None
    rate: float
    seed: int
    steps: int


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
        micro_batch: rows at once; fewer than the batch where the memory did not hold it.
    """

    metrics: Mapping[str, float]
    loss: float
    score: float
    trainable_parameters: int
    steps: int
    seconds: float
    stopped: bool
    artifact: Path | None
    micro_batch: int = 0


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
        self.task = task_of(self.data.columns.task)
        self.metric = main_metric(self.task, settings.evaluation.metric)
        head = TaskHead(self.task.name, self.data.label_names, settings.pooling)
        self.backbone = load_backbone(
            settings.backbone, head, dtype=settings.dtype, device=settings.device
        )
        self.model, self.tokenizer = self.backbone.model, self.backbone.tokenizer
        heads = hf.head_modules(self.model)
        names = [name for name, _ in self.model.named_parameters() if name.split(".")[0] in heads]
        self._head = HeadState(self.model, names, self.backbone.fresh)
        self._head.reset(self.model, settings.seed)
        self.max_length = length_limit(settings.max_length, self.model.config)
        self.setup = Setup(
            self.tokenizer, self.data.columns, self.data.label_names, self.max_length
        )
        self.collate = self.task.collator(self.setup)
        self._encoded: dict[str, Encoded] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about data, head and cut rows, as sentences."""
        cut = [
            f"{encoded.truncated} of {len(encoded.rows)} {name} rows are cut to {self.max_length} "
            "tokens" for name, encoded in self._encoded.items() if encoded.truncated
        ]
        if self.max_length < self.settings.max_length:
            cut.append(f"the backbone has positions for {self.max_length} tokens only")
        kind = self.model.config.model_type
        if self.settings.sites is None and kind not in families():
            cut.append(f"no built-in row describes {kind!r}, so its sites are inferred: peftref "
                       f"show --backbone {self.settings.backbone} prints them")
        return (*self.data.notes, *self.backbone.notes, *cut)

    def encoded(self, split: str) -> Encoded:
        """Return a split as tokens; the work is done once."""
        if split not in self._encoded:
            self._encoded[split] = self.task.encode(self.data.split(split), self.setup)
        return self._encoded[split]

    def evaluate(self, adapted: Trained, split: str) -> dict[str, float]:
        """Return loss and metrics of a split; those of written texts if a run is judged by one.

        Raises:
            DataError: there is no such split.
        """
        size, model = self.settings.evaluation.batch_size, adapted.model
        found = score_rows(model, self.encoded(split), self.task, self.setup, size)
        if self.metric in self.task.written:
            examples = self.data.split(split)
            found |= self.task.measure_written(model, examples, self.setup, size)
        return found

    def test(self, artifact: str | Path, split: str = "test") -> dict[str, float]:
        """Return loss and metrics of a saved artifact on a split of this session's data.

        Raises:
            ArtifactError: it is damaged, or made for another backbone or other classes.
            DataError: there is no such split.
        """
        labels = tuple(read(artifact).metadata.get("label_names", self.data.label_names))
        if labels != self.data.label_names:
            raise ArtifactError(
                f"{artifact} knows the labels {', '.join(labels)}; the data have "
                f"{', '.join(self.data.label_names)}"
            )
        try:
            with attached_artifact(self.model, artifact) as adapted:
                return self.evaluate(adapted, split)
        finally:
            self._head.reset(self.model, self.settings.seed)

    def fit(
        self,
        composition: str | Mapping[str, Any] | CompositionSpec | None,
        *,
        rate: float = 1.0,
        seed: int | None = None,
        steps: int | None = None,
        output: Path | None = None,
        resume: bool = False,
        on_evaluate: Callable[[Progress], bool | None] | None = None,
    ) -> FitResult:
        """Attach, train, score, save and detach; backbone and head are then as before.

        Args:
            composition: anything that `peftref.load` takes; None or ``none``: the head alone.
            rate: multiplies the learning rate: the settings', or each technique's own.
            seed: of initial values, row order and dropout; None: the settings'.
            steps: None: as the settings say.
            output: folder of the artifact; an artifact there is replaced at the end. Checkpoints
                are kept beside it until then.
            resume: go on from the last complete checkpoint of this very run, if there is one.
            on_evaluate: told of each score; the run ends early if it returns True.

        Raises:
            SpecError, CompositionError, BackboneError: the composition does not compile here.
            TrainingError: the loss is not a number, or the checkpoints are of another run.
        """
        spec = None if composition in (None, "none") else load(composition)
        order = Order(
            spec, self.settings.learning_rate, rate, self.settings.seed if seed is None else seed,
            steps or self.settings.total_steps(len(self.data.split("train"))),
        )
        if output is not None:
            check_free(output, overwrite=True)
        run = Run(
            self.settings.evaluation.steps(order.steps), keep=output is not None,
            on_evaluate=on_evaluate, on_step=self.on_step,
        )
        return self._fit(order, run, output, resume=resume)

    def _fit(self, order: Order, run: Run, output: Path | None, *, resume: bool) -> FitResult:
        """Train; a batch that the memory does not hold is divided, its gradients are added up."""
        parts, size = 1, self.settings.batch_size
        while True:
            try:
                return self._fit_parts(order, run, output, parts, resume=resume)
            except torch.OutOfMemoryError as error:
                told = str(error)
            # Outside of the handler, whose traceback keeps the tensors of the failed step.
            gc.collect()
            torch.cuda.empty_cache()
            if size % (2 * parts):
                raise DeviceMemoryError(
                    f"a step does not fit into memory with {size // parts} rows at once (the batch "
                    f"of {size} in {parts} parts): {told}"
                )
            parts, resume = 2 * parts, False

    def _fit_parts(
        self, order: Order, run: Run, output: Path | None, parts: int, *, resume: bool
    ) -> FitResult:
        begun = time.monotonic()
        with self._attached(order) as adapted, checkpoint_folder(output) as folder:
            start = self._start(order, folder, resume=resume)
            done = self._train(adapted, order, run, folder, start, parts)
            artifact = None
            if output is not None and not run.stopped:
                artifact = save_artifact(self, adapted, order, done, output)
                shutil.rmtree(folder)
            count = sum(each.numel() for each in adapted.trainable.values())
        value = score(self.metric, done.metrics[self.metric])
        seconds = time.monotonic() - begun
        return FitResult(
            done.metrics, done.loss, value, count, done.step, seconds, run.stopped, artifact,
            self.settings.batch_size // parts,
        )

    @contextmanager
    def _attached(self, order: Order) -> Generator[Trained]:
        """Attach for one run; whatever happens, the model is afterwards as it was loaded."""
        before = {name: each.requires_grad for name, each in self.model.named_parameters()}
        cache = self.model.config.use_cache if hasattr(self.model.config, "use_cache") else None
        self._head.reset(self.model, order.seed)
        adapted = (
            HeadOnly(self.model, hf.head_modules(self.model)) if order.composition is None
            else attach(self.model, order.composition, seed=order.seed, sites=self.settings.sites)
        )
        try:
            yield adapted
        finally:
            adapted.detach()
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before[name])
                parameter.grad = None
            if cache is not None:
                self.model.config.use_cache = cache
            self._head.reset(self.model, self.settings.seed)
            self.model.eval()

    def _start(self, order: Order, folder: Path, *, resume: bool) -> Path | None:
        """Return the checkpoint to go on from; else make the folder that of a new run."""
        found = last_checkpoint(folder) if resume else None
        identity = self.identity(order)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / IDENTITY).write_text(json.dumps(identity, indent=1), encoding="utf-8")
            return None
        try:
            held = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{folder / IDENTITY} is not readable: {error}") from error
        changed = sorted(
            name for name in {*identity, *held} if identity.get(name) != held.get(name)
        )
        if changed:
            raise TrainingError(
                f"{folder} holds checkpoints of another run; different: {', '.join(changed)}. Give "
                "the same settings to resume, or another output"
            )
        return found

    def identity(self, order: Order) -> dict[str, Any]:
        """Return what makes two runs the same run, as JSON."""
        settings = self.settings.model_dump(mode="json", exclude=set(INCIDENTAL))
        spec = order.composition
        asked = {
            "composition": None if spec is None else spec.model_dump(mode="json"),
            "learning_rate": order.learning_rate, "rate": order.rate, "seed": order.seed,
            "steps": order.steps, "rows": self.data.fingerprint,
        }
        return {**settings, "epochs": None, **asked}

    def _train(
        self, adapted: Trained, order: Order, run: Run, folder: Path, start: Path | None, parts: int
    ) -> Progress:
        settings = _divided(self.settings, parts)
        arguments = training_arguments(
            settings, folder, rate=(order.learning_rate or HEAD_RATE) * order.rate,
            seed=order.seed, steps=order.steps,
        )
        encoded = self.encoded("train")
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        numbers = training_order(
            encoded.lengths, batch * arguments.world_size, order.steps, order.seed
        )
        made = SessionTrainer(
            args=arguments, train_dataset=[encoded.rows[number] for number in numbers],
            data_collator=self.collate, callbacks=[run], adapted=adapted,
            cited_rates=order.rate if order.learning_rate is None else None,
            head_rate=self._head_rate(),
            scoring=lambda: self.evaluate(adapted, "validation"),
        )
        made.remove_callback(PrinterCallback)
        with hf.quiet(), _own_forward(self.model):
            made.train(resume_from_checkpoint=start and str(start))
        if run.last is not None and (run.stopped or not adapted.procedures):
            return run.last
        # Procedures may change the adapter at the end, and a run that is resumed at its last
        # step has not been scored.
        metrics = self.evaluate(adapted, "validation")
        return Progress(made.state.global_step, order.steps, metrics["loss"], metrics)

    def _head_rate(self) -> float | None:
        """Return the rate of the task head; None: that of the composition.

        A new linear layer on pooled vectors, whose entries are small, moves too slowly at the
        rates that are cited for adapters.
        """
        pooled = self.backbone.head.pooling in ("mean", "cls") and bool(self.backbone.fresh)
        return self.settings.head_learning_rate or (HEAD_RATE if pooled else None)


def _divided(settings: RunSettings, parts: int) -> RunSettings:
    """Return settings of the same effective batch, taken in ``parts``."""
    given = settings.arguments.get("gradient_accumulation_steps", 1)
    if parts == 1 or not isinstance(given, int):
        return settings
    arguments = {**settings.arguments, "gradient_accumulation_steps": given * parts}
    changed = {"batch_size": settings.batch_size // parts, "arguments": arguments}
    return settings.model_copy(update=changed)


@contextmanager
def checkpoint_folder(output: Path | None) -> Generator[Path]:
    """Give the folder of a run's checkpoints: beside the output, or gone at the end."""
    if output is not None:
        yield checkpoints_of(output)
        return
    with tempfile.TemporaryDirectory(prefix="peftref-") as made:
        yield Path(made)


@contextmanager
def _own_forward(model: nn.Module) -> Generator[None]:
    """Take back what accelerate does to the instance.

    With mixed precision it sets ``forward`` on the model, which would hide the class that a next
    attachment swaps in; and it leaves a model alone that it marked as prepared.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


def length_limit(wanted: int, config: PreTrainedConfig) -> int:
    """Return the length limit, at most what the backbone has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return wanted
    offset = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
    return min(wanted, positions - offset)
