"""What happens over training time: the moments at which training calls a procedure."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from peftref.spec.base import Frozen

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Adapter", "Procedure", "ProcedureArguments"]


class ProcedureArguments(Frozen):
    """Arguments of a procedure, from YAML."""


A = TypeVar("A", bound=ProcedureArguments)


class Adapter(Protocol):
    """What a procedure may use of an attached adapter."""

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        ...

    def tensors(self, members: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
        """Adapter tensors by name, of the named members or of all."""
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

    @property
    def needs_data(self) -> bool:
        """Whether ``setup`` must see batches."""
        return False

    @property
    def per_step(self) -> bool:
        """Whether training must call it while it runs (and not only ``setup``)."""
        return True

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        """Before the first step; ``forward`` gives the loss of a batch."""

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
