"""One frozen linear with an adapter for each sample, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from peftref.errors import PeftRefError
from peftref.ops.lora_linear_batched import cpu, reference
from peftref.ops.operator import Kernels, Needs, Operator, Rule, Saved
from peftref.ops.precision import autocast

__all__ = ["OPERATOR", "lora_linear_batched"]


def lora_linear_batched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """``y_n = W x_n + b + B_i (s_i * A_i x_n)`` with ``i = index_n``.

    K adapters share the frozen product, which serves K trials of a search on one batch (no
    ``index``: block n of the batch has adapter n) as well as an adapter for each sample.
    Ranks that differ are padded with zeros. Dropout, where it is wanted, is put on ``x`` before.

    Args:
        x: (N, ..., d).
        weight: (k, d), frozen; where it needs a gradient, the plain form runs.
        bias: (k).
        down: ``A`` (K, r, d), in the type of ``x`` or a wider one; gradients have their type.
        up: ``B`` (K, k, r).
        scale: ``s`` (K).
        index: (N) integers below K; without it K must be N.

    Raises:
        PeftRefError: there are not as many adapters as samples, and no index.
    """
    count, given = (down.shape[0], "adapters") if index is None else (index.shape[0], "indices")
    if count != x.shape[0]:
        raise PeftRefError(
            f"lora_linear_batched: {x.shape[0]} samples, but {count} {given}; each sample has one"
        )
    x, ((weight,), biases) = autocast(x, [weight], [] if bias is None else [bias])
    arguments = (x, weight, biases[0] if biases else None, down, up, scale, index)
    if weight.requires_grad:
        return reference.lora_linear_batched(*arguments)
    return OPERATOR(*arguments)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[0], -1, x.shape[-1]).shape[1]
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(x.shape[0], rows, down.shape[1]),
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if wanted[0] else 0),
        dy.new_empty(dy.shape[-1] if wanted[1] else 0),
        down.new_empty(down.shape if wanted[2] else 0),
        up.new_empty(up.shape if wanted[3] else 0),
        scale.new_empty(scale.shape if wanted[4] else 0),
    )


def _save(
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None],
    results: Sequence[Tensor],
) -> Saved:
    x, weight, _, down, up, scale, index = arguments
    held = [x, results[1], weight, down, up, scale]
    return Saved(held if index is None else [*held, index])


def _gradients(
    needs: Needs,
    saved: Saved,
    gradients: tuple[Tensor],
    backward: Callable[..., Sequence[Tensor]],
) -> list[Tensor | None]:
    wanted = [cast("bool", needs[i]) for i in (0, 2, 3, 4, 5)]
    index = saved.tensors[6] if len(saved.tensors) > 6 else None
    found = backward(gradients[0].contiguous(), *saved.tensors[:6], index, wanted)
    d_x, *others = (g if want else None for g, want in zip(found, wanted, strict=True))
    return [d_x, None, *others, None]


OPERATOR: Operator[Tensor] = Operator(
    "lora_linear_batched",
    reference=reference.lora_linear_batched,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)
