"""What a module was before its class was swapped."""

from __future__ import annotations

from torch import nn

__all__ = ["original_class"]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before the swap."""
    return getattr(type(module), "peftref_base", type(module))
