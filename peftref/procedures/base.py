"""What happens over training time: the moments at which training calls a procedure."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from peftref.ir.plan import Plan, PlannedTensor
from peftref.ir.primitive import TensorSpec
from peftref.spec.base import Frozen

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["HEAD", "Adapter", "Phase", "Procedure", "ProcedureArguments", "matches"]

HEAD = "head"
"""What procedures call the task head, beside members."""


class ProcedureArguments(Frozen):
    """Arguments of a procedure, from YAML.

    A procedure with a field ``members`` (comma-separated) that a technique asks for gets the name
    of the technique's own member.
    """


A = TypeVar("A", bound=ProcedureArguments)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of training; optimiser and schedule start afresh at its first step.

    Attributes:
        name: as the specification names it.
        start: steps that were done before it.
        rate: what the learning rate is multiplied by.
    """

    name: str
    start: int
    rate: float = 1.0


class Adapter(Protocol):
    """What a procedure may use of an attached adapter."""

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        ...

    def tensors(self, members: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
        """Adapter tensors by name, of the named members or of all."""
        ...

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Trained tensors by name, those that rest included."""
        ...

    @property
    def head(self) -> Mapping[str, nn.Parameter]:
        """Trained tensors of the task head by name, those that rest included."""
        ...

    @property
    def plan(self) -> Plan:
        """What was attached."""
        ...

    @property
    def planned(self) -> Mapping[str, PlannedTensor]:
        """What the plan says of each tensor, by the tensor's name."""
        ...

    def rate(self, tensor: Tensor) -> float:
        """The learning rate of a trained tensor in the step that runs."""
        ...

    def rest(self, names: Collection[str]) -> None:
        """Let these trained tensors have no gradient; all others have one."""
        ...

    def stored(self, path: str, member: str) -> Mapping[str, Tensor]:
        """What an artifact holds for a member, by the names that its tensors have here."""
        ...

    def aside(self) -> AbstractContextManager[nn.Module]:
        """Within this context only the members that are set aside take part."""
        ...


class Procedure(ABC, Generic[A]):
    """Base of all procedures; registered under ``name``. Every moment does nothing unless needed.

    ``required``: training without this procedure is another technique; a trainer that does not
    call it is refused before the first step.
    """

    name: ClassVar[str]
    Arguments: ClassVar[type[ProcedureArguments]] = ProcedureArguments
    required: ClassVar[bool] = True

    def __init__(self, arguments: A) -> None:
        self.arguments = arguments

    def concerns(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor is of the members that it is about; of all where it names none."""
        members = str(getattr(self.arguments, "members", ""))
        return not members or tensor.member in members.split(",")

    @property
    def needs_data(self) -> bool:
        """Whether ``setup`` must see batches."""
        return False

    @property
    def per_step(self) -> bool:
        """Whether training must call it while it runs (and not only ``setup``)."""
        return True

    @property
    def batches(self) -> int:
        """How many batches ``setup`` or ``before_phase`` sees at most."""
        return 8

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        """Refuse a composition, given as the names of its members, that it does not fit.

        Raises:
            CompositionError: what it names is not there.
        """

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        """Refuse a composition, given as its tensors with their members, that it does not fit.

        Raises:
            CompositionError: couplings made of a tensor what it cannot work with.
        """

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        """Before the first step; ``forward`` gives the loss of a batch."""

    def phases(self, total: int) -> tuple[Phase, ...]:
        """The parts of a training of ``total`` steps, the first from step 0; none: one part."""
        return ()

    def needs_data_at(self, phase: str) -> bool:
        """Whether ``before_phase`` must see batches."""
        return False

    def before_phase(
        self,
        adapter: Adapter,
        phase: str,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        """Before the first step of a phase, and before ``before_step`` of that step."""

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        """Return what to add to the loss of a step."""
        return None

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        """Before the forward of step ``step`` of ``total``."""

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        """Gradients are there, the optimiser has not moved."""

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        """The optimiser has moved, gradients are still there."""

    def on_evaluate(self, adapter: Adapter, metrics: Mapping[str, float]) -> None:
        """After an evaluation."""

    def at_end(self, adapter: Adapter) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


def matches(name: str, member: str, entries: Iterable[str]) -> bool:
    """Whether a tensor is named by one of ``entries``: ``member`` or ``member:glob``."""
    for entry in entries:
        owner, colon, glob = entry.partition(":")
        own = entry != HEAD and fnmatchcase(member, owner)
        if own and (not colon or fnmatchcase(name, f"*{glob}")):
            return True
    return False
