"""Which form of an op runs: one rule for all of them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

import torch
from torch import Tensor, nn

from peftref.errors import PeftRefError, unknown_name

__all__ = ["Form", "choose", "has_triton", "plain_forms"]


class Form(StrEnum):
    """The forms of an op.

    Attributes:
        REFERENCE: the definition, in plain torch; any device, any transform of functions.
        DIRECT: the same kernels as ``OPERATOR`` without torch's dispatcher, which costs more than
            a small product does on a CPU.
        OPERATOR: the registered op, which compilers take as one node.
    """

    REFERENCE = "reference"
    DIRECT = "direct"
    OPERATOR = "operator"


def _forced() -> bool:
    value = os.environ.get("PEFTREF_OPS", "")
    if value not in ("", "reference"):
        raise PeftRefError(
            f"environment variable PEFTREF_OPS: {unknown_name('form', value, ['reference'])}"
        )
    return value == "reference"


FORCED = _forced()
"""Whether ``PEFTREF_OPS=reference`` was set when this module was first imported."""


_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Within this context ops run by their definition, which can be differentiated twice."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def choose(x: Tensor) -> Form:
    """Return the form for an op whose first argument is ``x``.

    Args:
        x: the stream; its device and type decide.
    """
    if FORCED or x.device.type not in ("cpu", "cuda"):
        return Form.REFERENCE
    if torch.compiler.is_compiling():
        return Form.OPERATOR
    if _plain.get():  # a compiler is past this: it does not look into contexts
        return Form.REFERENCE
    # vmap, grad and jvp of torch.func, and tensors of other libraries (sharded, quantised),
    # know the operations of torch, and not ours.
    if torch._C._are_functorch_transforms_active() or type(x) not in (Tensor, nn.Parameter):  # noqa: SLF001
        return Form.REFERENCE
    return Form.DIRECT if x.device.type == "cpu" else Form.OPERATOR


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; torch for CUDA brings it, torch for CPUs does not."""
    return importlib.util.find_spec("triton") is not None
