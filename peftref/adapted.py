"""The handle of an attached adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftref.artifact import tensors_for
from peftref.errors import ArtifactError, BackboneError, TrainingError
from peftref.exporting import export_peft, save
from peftref.ir.plan import Plan, PlannedTensor
from peftref.lowering.activity import aside, disabled
from peftref.lowering.attach import Attachment, detach_plan, root_state
from peftref.lowering.merge import merge_modules, unmerge_modules
from peftref.lowering.prefix import interface_name
from peftref.lowering.root import RootState
from peftref.lowering.state import CHILD
from peftref.lowering.swap import state_of
from peftref.parameter_groups import parameter_groups
from peftref.procedures.base import Procedure
from peftref.registry import procedures

__all__ = ["Adapted"]


class Adapted:
    """An adapter on a model: train, merge, save, detach.

    Attributes:
        model: the very model that was given to ``attach``.
        plan: what was applied.
        name: the adapter's name.
        seed: of the initial values.
        handled: whether a trainer says that it calls the procedures.
    """

    def __init__(self, model: nn.Module, attachment: Attachment, seed: int = 0) -> None:
        self.model = model
        self.plan: Plan = attachment.plan
        self.name = attachment.name
        self.seed = seed
        self.handled = False
        self._attachment: Attachment | None = attachment
        self._prepared: set[int] = set()
        self._resting: frozenset[str] = frozenset()
        self.optimiser: torch.optim.Optimizer | None = None
        self.procedures: tuple[Procedure[Any], ...] = tuple(
            _procedure(spec.name, spec.arguments) for spec in attachment.plan.procedures
        )
        root = self.root()
        root.guard.checks[self.name] = self._check
        root.handles[self.name] = self

    # --- tensors -------------------------------------------------------------------------

    def tensors(self, members: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Adapter tensors by full name, of the named members or of all."""
        attachment = self.attached()
        found: dict[str, Tensor] = {}
        for tensor in self.plan.tensors:
            if members and tensor.member not in members:
                continue
            path, local = attachment.tensors[tensor.name]
            state = state_of(attachment.modules[path]) if path else self.root()
            found[tensor.name] = state.tree(self.name).fetcher(local)()
        return found

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained tensors of the adapter by full name, those that rest included."""
        return {
            name: tensor
            for name, tensor in self.tensors().items()
            if isinstance(tensor, nn.Parameter)
            and (tensor.requires_grad or name in self._resting)
        }

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the special tokens, for edits that act at them.

        At first those that the configuration names; set a tokenizer's ``all_special_ids``
        without the padding token where it names none (BERT).
        """
        root = root_state(self.model)
        return root.guard.special if root is not None else ()

    @special_tokens.setter
    def special_tokens(self, ids: Iterable[int]) -> None:
        root = root_state(self.model)
        if root is not None:
            root.guard.special = tuple(sorted(set(ids)))

    @property
    def planned(self) -> dict[str, PlannedTensor]:
        """What the plan says of each tensor, by the tensor's name."""
        return {tensor.name: tensor for tensor in self.plan.tensors}

    def rest(self, names: Collection[str]) -> None:
        """Let these trained tensors (of adapter and head) have no gradient; all others have one."""
        known = {**self.trainable, **self.head}
        self._resting = frozenset(names)
        for name, parameter in known.items():
            parameter.requires_grad_(name not in self._resting)
            if name in self._resting:
                parameter.grad = None

    @property
    def head(self) -> dict[str, nn.Parameter]:
        """Trained tensors of the task head by full name."""
        return {name: parameter for name, parameter in self._in_heads()
                if parameter.requires_grad or name in self._resting}

    def _in_heads(self) -> Iterator[tuple[str, nn.Parameter]]:
        heads = self.plan.table.head_modules
        for name, parameter in self.model.named_parameters():
            inside = any(name.startswith(f"{head}.") or name == head for head in heads)
            if inside and f".{CHILD}." not in f".{name}":
                yield name, parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Trained tensors and masks by full name; frozen random tensors are made from seeds."""
        stored = {t.name for t in self.plan.tensors if t.spec.trainable or t.spec.buffer}
        return {name: t.detach() for name, t in self.tensors().items() if name in stored}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take tensors back; strict both ways.

        Raises:
            ArtifactError: a tensor is missing, unknown or of another shape.
        """
        own = self.state_dict()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise ArtifactError(
                f"{len(missing)} adapter tensors are missing and {len(extra)} unknown; first "
                f"missing: {missing[:1] or 'none'}, first unknown: {extra[:1] or 'none'}"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ArtifactError(
                    f"{name}: shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                )
            if tensor.is_floating_point() != own[name].is_floating_point():
                raise ArtifactError(f"{name}: type {tensor.dtype}, expected {own[name].dtype}")
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name in state:
                    tensor.copy_(state[name])
        self._prepared = set(range(len(self.procedures)))

    def stored(self, path: str, member: str) -> Mapping[str, Tensor]:
        """What an artifact holds for a member, by the names that its tensors have here."""
        return tensors_for(self.plan, member, path)

    def load_head(self, head: Mapping[str, Tensor]) -> None:
        """Take task-head tensors back.

        Raises:
            ArtifactError: the model has no such head, or one of another shape.
        """
        own = dict(self._in_heads())
        for name, tensor in head.items():
            if name not in own or own[name].shape != tensor.shape:
                found = tuple(own[name].shape) if name in own else "none"
                raise ArtifactError(
                    f"head tensor {name!r} has shape {tuple(tensor.shape)}, the model's: {found}; "
                    "load the backbone with the same task and number of labels"
                )
        with torch.no_grad():
            for name, tensor in head.items():
                own[name].copy_(tensor)

    def parameter_groups(
        self, lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return groups for an optimiser.

        Every member trains at ``lr`` or, without it, at its spec's cited rate, times the ratios
        that the spec gives (LoRA+); the head at the highest of those rates' base.

        Raises:
            TrainingError: no rate is given and a spec has none.
        """
        return parameter_groups(self, lr, weight_decay)

    def rate(self, tensor: Tensor) -> float:
        """The learning rate of a trained tensor in the step that runs.

        Raises:
            TrainingError: the loop has not said which optimiser it uses.
        """
        for group in [] if self.optimiser is None else self.optimiser.param_groups:
            if any(parameter is tensor for parameter in group["params"]):
                return float(group["lr"])
        raise TrainingError("a procedure needs the learning rate of the step; train with "
                            "peftref.trainer, or set adapted.optimiser")

    # --- procedures ----------------------------------------------------------------------

    def setup_without_data(self) -> None:
        """Run the set-up of procedures that need no data."""
        for index, procedure in enumerate(self.procedures):
            if not procedure.needs_data:
                procedure.setup(self, (), _no_forward)
                self._prepared.add(index)

    def prepare(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run the set-up of procedures that must see data (SNIP), once.

        Args:
            batches: mappings of tensors on the model's device, with labels.
        """
        held = list(batches) if any(p.needs_data for p in self.procedures) else []
        with self._unchecked() as forward:
            for index, procedure in enumerate(self.procedures):
                if index not in self._prepared:
                    procedure.setup(self, held, forward)
                    self._prepared.add(index)

    def begin_phase(self, phase: str, batches: Iterable[Mapping[str, Any]]) -> None:
        """Tell the procedures that a phase begins; ``batches`` as for ``prepare``."""
        needed = any(p.needs_data_at(phase) for p in self.procedures)
        held = list(batches) if needed else []
        with self._unchecked() as forward:
            for procedure in self.procedures:
                procedure.before_phase(self, phase, held, forward)

    @contextmanager
    def _unchecked(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        """Give the loss of a batch outside training, whatever is still to be prepared."""
        training = self.model.training
        self.model.eval()
        root = self.root()
        checks, root.guard.checks = root.guard.checks, {}
        try:
            yield lambda batch: self.model(**batch).loss
        finally:
            root.guard.checks = checks
            self.model.train(training)

    def _check(self, model: nn.Module) -> None:
        """Before a forward: nothing was replaced, and no procedure is lost in training."""
        self.verify()
        if not model.training or not torch.is_grad_enabled():
            return
        for index, procedure in enumerate(self.procedures):
            if index not in self._prepared:
                raise TrainingError(
                    f"{procedure.name}: needs data before the first step; call "
                    "adapted.prepare(batches), or train with peftref"
                )
            if procedure.required and procedure.per_step and not self.handled:
                raise TrainingError(
                    f"{procedure.name}: this trainer does not call it, so another technique "
                    "would be trained; use peftref.trainer(YourTrainer), or set "
                    "adapted.handled = True if your loop calls adapted.procedures"
                )

    def verify(self) -> None:
        """Check that every adapted module is still in the model, and prefixes in attention.

        Raises:
            BackboneError: something was replaced after attach, and the adapter with it.
        """
        for config, before in self.root().implementations:
            if config._attn_implementation != interface_name(before):  # noqa: SLF001
                raise BackboneError(
                    "the attention implementation was changed after attach, so prefixes have no "
                    "effect; detach, change it, then attach again"
                )
        for path, module in self.attached().modules.items():
            try:
                found = self.model.get_submodule(path)
            except AttributeError:
                found = None
            if found is not module:
                raise BackboneError(
                    f"{path}: was replaced after attach, so its adapter has no effect; detach "
                    "before changing modules, then attach again"
                )

    # --- active, merged, detached -----------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within this context the model is the backbone; what is merged is merged again after."""
        merged = self.merged
        if merged:
            self.unmerge()
        try:
            with disabled(self.model, self.attached()):
                yield self.model
        finally:
            if merged:
                self.merge(partial=True)

    @contextmanager
    def aside(self) -> Iterator[nn.Module]:
        """Within this context only the members that are set aside take part (a teacher)."""
        with aside(self.model, self.attached()):
            yield self.model

    def merge(self, *, partial: bool = False, dequantize: bool = False) -> tuple[str, ...]:
        """Fold the adapter into the backbone's weights.

        Args:
            partial: fold what can be folded and keep the rest running.
            dequantize: give quantised modules that carry an edit an ordinary weight; without it
                they are refused, as a sum rounded to their few bits would lose the edit.

        Returns:
            What could not be folded, with reasons; empty without ``partial``.

        Raises:
            MergeError: something cannot be folded and ``partial`` is not set.
        """
        self.verify()
        return merge_modules(
            self.model, self.attached(), partial=partial, dequantize=dequantize
        )

    @property
    def merged(self) -> bool:
        """Whether something of the adapter is folded into the backbone."""
        modules = self.attached().modules.values()
        return any(state_of(module).adapters[self.name].merged for module in modules)

    def unmerge(self) -> None:
        """Undo ``merge`` bit for bit, from kept copies."""
        unmerge_modules(self.model, self.attached())

    def detach(self) -> nn.Module:
        """Remove the adapter; the backbone is bit for bit what it was. Returns the model."""
        attachment = self.attached()
        self.rest(())
        unmerge_modules(self.model, attachment)
        root = root_state(self.model)
        if root is not None:
            root.guard.checks.pop(self.name, None)
            root.handles.pop(self.name, None)
        detach_plan(self.model, attachment)
        self._attachment = None
        return self.model

    def save(self, path: str | Path, **metadata: Any) -> Path:  # noqa: ANN401 - JSON values
        """Write an artifact folder: ``peftref.json`` and ``adapter_model.safetensors``.

        Args:
            path: folder, made or replaced as a whole.
            metadata: what the caller knows: head, labels, tokenizer, metrics.
        """
        self.verify()
        return save(self, Path(path), metadata)

    def to_peft(self, path: str | Path) -> Path:
        """Write the adapter in huggingface/peft's format.

        Raises:
            ArtifactError: PEFT cannot express it; the message lists what.
        """
        return export_peft(self, Path(path))

    def attached(self) -> Attachment:
        """What was changed in the model; for the parts of peftref that need it.

        Raises:
            BackboneError: the adapter is detached.
        """
        if self._attachment is None:
            raise BackboneError(f"adapter {self.name!r} is detached")
        return self._attachment

    def root(self) -> RootState:
        """The state of the adapted model as a whole.

        Raises:
            BackboneError: the adapter is detached.
        """
        root = root_state(self.model)
        if root is None:
            raise BackboneError(f"adapter {self.name!r} is detached")
        return root

    def __repr__(self) -> str:
        return f"Adapted({self.name!r}, {self.plan.composition.composition!r})"


def _procedure(name: str, arguments: Mapping[str, Any]) -> Procedure[Any]:
    kind = procedures.get(name)
    return kind(kind.Arguments(**arguments))


def _no_forward(_: Mapping[str, Any]) -> Tensor:
    raise TrainingError("this procedure needs no data")
