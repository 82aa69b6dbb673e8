"""Edits that read the hidden states of all layers of a stack.

The states are collected around the calls of the layers and not inside of them, so that a
recomputed layer collects nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref.lowering.state import AdapterState

__all__ = ["collected"]


def collected(
    module: nn.Module,
    state: AdapterState,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401 - whatever the layer returns
    """Run a layer; the last call of its stack applies the edits that read all of them."""
    stack, runs = state.collects or ("", 0)
    seen = state.context.hidden.setdefault(stack, [])
    if not seen:
        seen.append(args[0] if args else kwargs[state.argument])
    result = call(*args, **kwargs)
    y: Tensor = result[0] if isinstance(result, tuple) else result
    seen.append(y)
    if len(seen) <= runs:
        return result
    del state.context.hidden[stack]
    fold = state.fold(module)
    for edit in fold.of_stack if fold is not None else ():
        y = edit.onto(y, torch.stack(seen))
    return (y, *result[1:]) if isinstance(result, tuple) else y
