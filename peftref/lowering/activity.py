"""Which edits of an attached adapter take part: all, none, or those that are set aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftref.lowering.attach import Attachment, refresh
from peftref.lowering.state import AdapterEdits, AdapterState
from peftref.lowering.swap import state_of

__all__ = ["aside", "disabled"]


@contextmanager
def disabled(model: nn.Module, attachment: Attachment) -> Iterator[None]:
    """Within this context no edit of the adapter takes part."""
    name, held = attachment.name, _held(attachment)
    before = [(edits.active, name in state.carriers) for state, edits in held]
    for state, edits in held:
        edits.active = False
        state.carriers.discard(name)
        state.changed()
    refresh(model)
    try:
        yield
    finally:
        for (state, edits), (active, carries) in zip(held, before, strict=True):
            edits.active = active
            (state.carriers.add if carries else state.carriers.discard)(name)
            state.changed()
        refresh(model)


@contextmanager
def aside(model: nn.Module, attachment: Attachment) -> Iterator[None]:
    """Within this context the edits that are set aside take part, and no others of the adapter."""
    held = _held(attachment)
    _show(model, held, aside=True)
    try:
        yield
    finally:
        _show(model, held, aside=False)


def _show(
    model: nn.Module, held: list[tuple[AdapterState, AdapterEdits]], *, aside: bool
) -> None:
    for state, edits in held:
        edits.aside = aside
        state.changed()
    refresh(model)


def _held(attachment: Attachment) -> list[tuple[AdapterState, AdapterEdits]]:
    states = [state_of(module) for module in attachment.modules.values()]
    return [(state, state.adapters[attachment.name]) for state in states]
