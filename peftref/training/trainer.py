"""What an attached composition needs of any ``transformers`` Trainer class."""

# Transformers' overridden signatures are untyped.
# ruff: noqa: ANN401, D102

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from peftref.errors import TrainingError
from peftref.ir.plan import PlannedTensor
from peftref.lowering.attach import root_state
from peftref.procedures.base import Phase, Procedure
from peftref.training.heads import averages_loss
from peftref.training.schedule import joined_schedule

__all__ = ["Trained", "last_checkpoint", "trainer"]

WEIGHTS = "model.safetensors"  # the name that the stock resume looks for
STATE = "trainer_state.json"  # the last file that a checkpoint gets

T = TypeVar("T", bound=Trainer)
_CLASSES: dict[type, type] = {}


class Trained(Protocol):
    """What is trained: an attached composition, or a task head alone."""

    handled: bool
    optimiser: Any

    @property
    def model(self) -> Any: ...
    def tensors(self, members: tuple[str, ...] = ()) -> Mapping[str, Tensor]: ...
    @property
    def trainable(self) -> Mapping[str, nn.Parameter]: ...
    @property
    def head(self) -> Mapping[str, nn.Parameter]: ...
    @property
    def planned(self) -> Mapping[str, PlannedTensor]: ...
    def rate(self, tensor: Tensor) -> float: ...
    def rest(self, names: Collection[str]) -> None: ...
    @property
    def procedures(self) -> Sequence[Procedure[Any]]: ...
    def parameter_groups(
        self, lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def prepare(self, batches: Iterable[Mapping[str, Any]]) -> None: ...
    def begin_phase(self, phase: str, batches: Iterable[Mapping[str, Any]]) -> None: ...
    def detach(self) -> Any: ...


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint under ``folder`` that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(found, key=lambda each: int(each.name[11:]), reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (path / WEIGHTS).is_file():
            return path
    return None


class Moments(TrainerCallback):
    """Calls the procedures of a composition at the moments of a step.

    Args:
        adapted: what is trained; only an attached composition has procedures.
        begin: told of every step before the procedures are; begins phases.
    """

    def __init__(self, adapted: Trained, begin: Callable[[int, int], None]) -> None:
        self.adapted: Any = adapted
        self.begin = begin

    def _each(self, moment: str, state: Any, optimiser: Any = None) -> None:
        if optimiser is not None:
            self.adapted.optimiser = optimiser
        for procedure in self.adapted.procedures:
            getattr(procedure, moment)(self.adapted, state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin(state.global_step, state.max_steps)
        self._each("before_step", state)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self._each("after_backward", state, kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self._each("after_step", state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        for procedure in self.adapted.procedures:
            procedure.on_evaluate(self.adapted, metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            for procedure in self.adapted.procedures:
                procedure.at_end(self.adapted)


def trainer(base: type[T]) -> type[T]:
    """Return ``base`` with what an attached composition needs.

    The class adds the procedures' losses and calls their moments, builds the optimiser from the
    composition's parameter groups, keeps adapter and head alone in checkpoints, resumes from
    them bit for bit, and stops at a loss that is not a number. It takes one more keyword,
    ``adapted``: what `peftref.attach` returned.

    Args:
        base: ``transformers.Trainer`` or a subclass of it, such as TRL's ``SFTTrainer``.
    """
    if base not in _CLASSES:
        name = f"Adapted{base.__name__}"
        _CLASSES[base] = type(name, (AdaptedTraining, base), {"__module__": __name__})
    return cast("type[T]", _CLASSES[base])


class AdaptedTraining(Trainer):
    """The overrides that `trainer` puts before a Trainer class."""

    def __init__(
        self, *args: Any, adapted: Trained | None = None, cited_rates: float | None = None,
        head_rate: float | None = None, **kwargs: Any
    ) -> None:
        """Take the base's arguments, and two more.

        Args:
            *args: for the base.
            adapted: what is trained; its model is the default of ``model``. None: what is
                attached to ``model``.
            cited_rates: use each technique's own learning rate, times this factor; None: use
                the learning rate of ``args``.
            head_rate: learning rate of the task head; None: as the composition's.
            **kwargs: for the base.
        """
        given = kwargs.get("model", args[0] if args else None)
        self.adapted = adapted = adapted if adapted is not None else _attached_to(given)
        self.cited_rates = cited_rates
        self.head_rate = head_rate
        if not args:
            kwargs.setdefault("model", adapted.model)
        adapted.handled = True
        if given not in (None, adapted.model):
            raise TrainingError("the Trainer's model is not the model that was adapted")
        with _adapters_on_quantised(adapted.model):
            super().__init__(*args, **kwargs)
        if averages_loss(adapted.model):
            # These take any keyword but average over the micro-batch, so the sum over
            # micro-batches has to be divided by their number.
            self.model_accepts_loss_kwargs = False
        self.add_callback(Moments(adapted, self._begin_phase))

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Build the optimiser from the composition's parameter groups."""
        if self.optimizer is not None:
            return self.optimizer
        opt_model = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast("Any", opt_model))
        if {"params", "model", "optimizer_dict"} & set(options):
            raise TrainingError(
                f"optimiser {self.args.optim!s} chooses its own parameters; take one that does not"
            )
        rate = self.args.learning_rate if self.cited_rates is None else None
        groups = self.adapted.parameter_groups(lr=rate, weight_decay=self.args.weight_decay)
        if self.cited_rates is not None:
            groups = [{**group, "lr": group["lr"] * self.cited_rates} for group in groups]
        if self.head_rate is not None:
            groups = _with_head_rate(groups, self.adapted.head.values(), self.head_rate)
        self._check_groups(groups)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        lost = [
            name for name, parameter in self.adapted.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in grouped
        ]
        if lost:
            raise TrainingError(
                f"{len(lost)} trainable parameters belong neither to the composition nor to the "
                f"task head and would not be trained: {', '.join(lost[:3])}. Freeze them"
            )

    def _phases(self, total: int) -> tuple[Phase, ...]:
        found = (procedure.phases(total) for procedure in self.adapted.procedures)
        return next((phases for phases in found if phases), ())

    def _begin_phase(self, step: int, total: int) -> None:
        """Begin the phase whose first step this is; its optimiser knows nothing of before."""
        for phase in self._phases(total):
            if phase.start == step:
                self.optimizer.state.clear()
                self._show_batches(lambda batches, name=phase.name:
                                   self.adapted.begin_phase(name, batches))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; with phases, one for each of them after the other."""
        phases = self._phases(num_training_steps)
        if not phases or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        ends = [*(phase.start for phase in phases[1:]), num_training_steps]
        parts: list[Any] = []
        for phase, end in zip(phases, ends, strict=True):
            self.lr_scheduler = None
            parts.append(super().create_scheduler(end - phase.start, optimizer))
        self.lr_scheduler = joined_schedule(optimizer, phases, parts)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Add the losses of the procedures to the base's."""
        wanted = kwargs.pop("return_outputs", args[0] if args else False)
        count = kwargs.pop("num_items_in_batch", args[1] if len(args) > 1 else None)
        given = dict(inputs)  # the base takes labels out
        loss, outputs = super().compute_loss(
            cast("Any", model), inputs, return_outputs=True, num_items_in_batch=count, **kwargs
        )
        if model.training:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and count is not None
            )
            # A loss over the whole accumulated batch is not divided again, so the extra is here.
            share = self.current_gradient_accumulation_steps if scaled else 1
            for procedure in self.adapted.procedures:
                extra = procedure.loss(model, given, outputs)
                if extra is not None:
                    loss = loss + extra / share
        return (loss, outputs) if wanted else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stop before a loss that is not a number reaches the parameters."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            raise TrainingError(
                f"step {self.state.global_step + 1} of {self.state.max_steps}: the loss is "
                f"{float(loss)} at learning rate {rate:.3g}. The last good state is kept; lower "
                "the learning rate, or use dtype float32"
            )
        return loss

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, preparing the procedures on the first batches; resume skips what was cut off."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(Path(str(self.args.output_dir)))
            if found is None:
                folder = self.args.output_dir
                raise TrainingError(f"{folder}: no complete checkpoint to resume from")
            resume_from_checkpoint = str(found)
        if not resume_from_checkpoint and self.adapted.procedures:
            self._show_batches(self.adapted.prepare)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _show_batches(self, show: Callable[[Iterable[Mapping[str, Any]]], None]) -> None:
        """Show the first batches of an epoch, without moving any random stream."""
        count = max(procedure.batches for procedure in self.adapted.procedures)
        devices = [self.args.device] if self.args.device.type == "cuda" else []

        def batches() -> Iterator[Mapping[str, Any]]:
            for batch in islice(self.get_train_dataloader(), count):
                yield dict(self._prepare_inputs(batch))

        with torch.random.fork_rng(devices=devices):
            show(batches())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write adapter and head alone; sharded training keeps the base's own way."""
        if state_dict is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        states = [procedure.state_dict() for procedure in self.adapted.procedures]
        tensors, plain = self._tensors(), [dict[str, Any]() for _ in states]
        for number, state in enumerate(states):
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"procedure.{number}.{name}"] = value.detach().cpu().clone()
                else:
                    plain[number][name] = value
        told = {"format": "pt", "procedures": json.dumps(plain)}
        save_file(tensors, folder / WEIGHTS, metadata=told)

    def _tensors(self) -> dict[str, Tensor]:
        held = {f"adapter.{name}": value for name, value in self.adapted.state_dict().items()}
        held |= {f"head.{name}": value for name, value in self.adapted.head.items()}
        # A copy each: safetensors refuses views of one storage.
        return {name: value.detach().cpu().contiguous().clone() for name, value in held.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load adapter and head; a checkpoint of anything else is refused."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        try:
            with safe_open(path, framework="pt") as opened:
                loaded = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                told = json.loads((opened.metadata() or {}).get("procedures", "[]"))
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"{path}: not a readable checkpoint: {error}") from error
        for number, procedure in enumerate(self.adapted.procedures):
            prefix = f"procedure.{number}."
            names = [name for name in loaded if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): loaded.pop(name) for name in names}
            procedure.load_state_dict({**(told[number] if number < len(told) else {}), **tensors})
        _check_keys(path, loaded, self._tensors())
        self.adapted.load_state_dict({
            name.removeprefix("adapter."): value
            for name, value in loaded.items() if name.startswith("adapter.")
        })
        for name, parameter in self.adapted.head.items():
            parameter.data.copy_(loaded[f"head.{name}"])

    def _load_best_model(self) -> None:
        """Load the best checkpoint the way that it was written."""
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _attached_to(model: Any) -> Trained:
    root = root_state(model) if isinstance(model, nn.Module) else None
    names = list(root.handles) if root is not None else []
    if root is None or len(names) != 1:
        found = f"adapters {', '.join(names)}" if names else "no adapter"
        raise TrainingError(f"the Trainer's model has {found} attached; pass adapted= the one")
    return root.handles[names[0]]


@contextmanager
def _adapters_on_quantised(model: Any) -> Generator[None]:
    """Tell transformers meanwhile that a quantised model has adapters, as it asks of PEFT's."""
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_trainable", False)
    if not getattr(model, "is_quantized", False) or not trainable:
        yield
        return
    model._hf_peft_config_loaded = True  # noqa: SLF001
    try:
        yield
    finally:
        del model._hf_peft_config_loaded  # noqa: SLF001


def _with_head_rate(
    groups: Iterable[Mapping[str, Any]], head: Iterable[nn.Parameter], rate: float
) -> list[dict[str, Any]]:
    """Return the groups with the head's parameters in groups of their own, at ``rate``."""
    known = {id(parameter) for parameter in head}
    split: list[dict[str, Any]] = []
    for group in groups:
        for of_head in (False, True):
            chosen = [each for each in group["params"] if (id(each) in known) == of_head]
            if chosen:
                lr = rate if of_head else group["lr"]
                split.append({**group, "params": chosen, "lr": lr})
    return split


def _check_keys(path: Path, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(loaded))
    foreign = sorted(set(loaded) - set(expected))
    shapes = [name for name in expected if name in loaded
              and loaded[name].shape != expected[name].shape]
    if missing or foreign or shapes:
        found = [f"{len(names)} {what} ({names[0]})" for what, names in
                 (("missing", missing), ("unknown", foreign), ("of another shape", shapes))
                 if names]
        raise TrainingError(
            f"{path} is no checkpoint of this composition and head: tensors {', '.join(found)}"
        )
