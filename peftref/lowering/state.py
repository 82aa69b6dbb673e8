"""What a swapped module carries: adapter tensors, and the edits that are active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.ir.edits import EditPlan
from peftref.lowering.fold import Fold, Slot
from peftref.lowering.program import BoundEdit
from peftref.lowering.weight import dense_weight

__all__ = ["CHILD", "AdapterState", "CallContext", "Seam", "TensorTree", "settled"]

CHILD = "peftref"
"""Name of the one child that a swapped module gets; all adapter keys lie under it."""


class TensorTree(nn.Module):
    """Raw parameters and buffers under dotted names.

    Raw, because a backbone's ``_init_weights`` would draw anew what lies in a Linear.
    """

    def put(self, name: str, tensor: Tensor, *, trainable: bool, buffer: bool) -> None:
        """Register a tensor under a dotted name."""
        tree: nn.Module = self
        *folders, leaf = name.split(".")
        for folder in folders:
            if folder not in tree._modules:
                tree.add_module(folder, TensorTree())
            tree = tree._modules[folder]  # pyright: ignore[reportAssignmentType]
        if buffer:
            tree.register_buffer(leaf, tensor)
        else:
            tree.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trainable))

    def fetcher(self, name: str) -> Callable[[], Tensor]:
        """Return a function that gives the tensor of that name as it is now."""
        *folders, leaf = name.split(".")
        tree: nn.Module = self
        for folder in folders:
            tree = tree._modules[folder]  # pyright: ignore[reportAssignmentType]
        return lambda: getattr(tree, leaf)


@dataclass
class Seam:
    """Between the halves of a reversible layer: what to make of what the first one gave."""

    function: Callable[[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple[type[Seam], tuple[()]]:
        return Seam, ()


@dataclass
class CallContext:
    """What belongs to the running forward call of one model.

    Attributes:
        masks: padding masks by stack; None outside a call of the whole model.
        hidden: by stack, the states that have left its layers so far, its input first.
        collects: the stacks of which some edit reads them.
        tapes: by stack, what the backward passes of its reversible layers hand down.
    """

    masks: dict[str, Tensor] | None = None
    hidden: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    collects: frozenset[str] = frozenset()
    tapes: dict[str, Any] = field(default_factory=dict[str, Any])

    @contextmanager
    def within(self, masks: dict[str, Tensor] | None) -> Iterator[None]:
        """Let gates see these padding masks, as in the call that they come from."""
        before, self.masks = self.masks, masks
        try:
            yield
        finally:
            self.masks = before


@dataclass
class AdapterEdits:
    """The edits that one adapter has in one module, and whether they take part."""

    edits: tuple[EditPlan, ...]
    sources: tuple[tuple[tuple[bool, str], ...], ...]  # per edit, per tensor: (shared, name)
    active: bool = True
    merged: frozenset[int] = frozenset()
    scale: float = 1.0
    aside: bool = False  # whether those that are set aside take part, instead of the others


class AdapterState(nn.Module):
    """The child of a swapped module. Children of its own: one ``TensorTree`` per adapter."""

    def __init__(self, context: CallContext, argument: str) -> None:
        super().__init__()
        self.context = context
        self.argument = argument
        self.adapters: dict[str, AdapterEdits] = {}
        self.carries: str | None = None
        self.carriers: set[str] = set()
        self.puts: dict[str, Slot] = {}
        self.takes: Slot | None = None
        self.masked_block = False
        self.seam: Seam | None = None  # of a layer that runs on two streams in halves
        self.at_seam: Seam | None = None  # of the norm that is its seam
        self.collects: tuple[str, int] | None = None  # stack, and how often its layers run
        self._fold: Fold | None = None
        self._stale = True
        # The owner of shared tensors is registered on the root only: here it must be no child.
        # Nor must the module that carries this state: it is no part of its own child.
        self.__dict__["root"] = None
        self.__dict__["host"] = None
        self.__dict__["projections"] = ()

    def forward(self) -> None:
        """A container; the swapped module runs its fold."""
        raise TypeError("the adapter state is no layer")

    def token_mask(self, stack: str) -> Tensor | None:
        """The padding mask of the running call."""
        if self.context.masks is None:
            raise BackboneError(
                "a gate must know the padding, which only a call of the whole model hands on; "
                "call the model that was given to attach, not a module inside it"
            )
        return self.context.masks.get(stack)

    def weight(self) -> Tensor:
        """The frozen weight of the module that carries this state."""
        return dense_weight(self.__dict__["host"])

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen projections of the attention that carries this state make of rows."""
        key, value = (project(rows) for project in self.__dict__["projections"])
        return key, value

    def tree(self, adapter: str) -> TensorTree:
        """The tensors of one adapter, made on first use."""
        if adapter not in self._modules:
            if hasattr(self, adapter):
                raise BackboneError(f"{adapter!r} cannot be an adapter's name; choose another one")
            self.add_module(adapter, TensorTree())
        return self._modules[adapter]  # pyright: ignore[reportReturnType]

    def changed(self) -> None:
        """Let the next forward bind the edits anew."""
        self._stale = True
        self._fold = None

    def fold(self, module: nn.Module) -> Fold | None:
        """The active edits, bound; None when there is nothing to do."""
        if self._stale:
            bound = [edit for _, edit in self.bound()]
            carries = self.carries if self.carriers else None
            puts = tuple(self.puts.values()) if self.carriers else ()
            needed = bound or carries or puts or self.takes is not None
            self._fold = (
                Fold(module, bound, self.argument, carries, puts, self.takes) if needed else None
            )
            self._stale = False
        return self._fold

    def bound(self, only: str | None = None) -> Iterator[tuple[str, BoundEdit]]:
        """Bind the edits that take part, or those of one adapter even while it is disabled."""
        for name, held in self.adapters.items():
            if name != only if only is not None else not held.active:
                continue
            for index, edit in enumerate(held.edits):
                if index not in held.merged and edit.write.aside is held.aside:
                    yield name, self._bind(name, held, index, edit)

    def _bind(self, name: str, held: AdapterEdits, index: int, edit: EditPlan) -> BoundEdit:
        fetch = tuple(
            (self.__dict__["root"] if shared else self).tree(name).fetcher(tensor)
            for shared, tensor in held.sources[index]
        )
        return BoundEdit(edit, self, fetch, held.scale)

    def __getstate__(self) -> dict[str, Any]:
        # Bound forms are closures over this very object: a copy must bind its own.
        return {**self.__dict__, "_fold": None, "_stale": True}


@contextmanager
def settled(states: Iterable[AdapterState]) -> Iterator[None]:
    """Within this context nothing is drawn: routes are averaged as outside training.

    What is merged or exported must not depend on the mode that the model happens to be in.
    """
    before = [(state, state.training) for state in states]
    for state, _ in before:
        state.training = False
    try:
        yield
    finally:
        for state, training in before:
            state.training = training
