"""What one adapter changed in a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from peftref.ir.plan import Plan

__all__ = ["Attachment"]


@dataclass
class Attachment:
    """What one adapter changed, as needed to undo it.

    Attributes:
        name: the adapter's name.
        plan: its plan.
        modules: path -> module object at attach; a replaced module is noticed by identity.
        tensors: full name -> (module path or "" for the root, dotted name in the tree).
    """

    name: str
    plan: Plan
    modules: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
