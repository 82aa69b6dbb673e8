"""A frozen linear with a trained difference at some places of its weight, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from peftref.errors import PeftRefError, unknown_name
from peftref.ops.masked_delta_linear import cpu, reference
from peftref.ops.operator import Kernels, Needs, Operator, Rule, Saved
from peftref.ops.precision import autocast

__all__ = ["OPERATOR", "masked_delta_linear"]


def masked_delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    structure: str = "entries",
) -> Tensor:
    """``y = (W + D) x + b``, ``D`` zero but at ``index``.

    SHiRA, Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175. Entries cost a whole weight
    gradient; rows, columns and blocks cost what they touch.

    Args:
        x: (..., d).
        weight: (k, d), frozen; where it needs a gradient, the plain form runs.
        bias: (k).
        values: entries (n), rows (n, d), columns (k, n) or blocks (n, s, s), in the type of ``x``
            or a wider one, which their gradient has too.
        index: places in the flat weight (n), rows (n), columns (n), or row and column of a block,
            counted in blocks (n, 2).
        structure: entries, rows, columns or blocks.

    Raises:
        PeftRefError: no such structure, or blocks that do not divide the weight.
    """
    if structure not in reference.STRUCTURES:
        raise PeftRefError(
            "masked_delta_linear: " + unknown_name("structure", structure, reference.STRUCTURES)
        )
    size = values.shape[-1] if structure == "blocks" else 1
    if weight.shape[0] % size or weight.shape[1] % size:
        raise PeftRefError(
            f"masked_delta_linear: blocks of {size} do not divide a weight of "
            f"{weight.shape[0]} x {weight.shape[1]}"
        )
    x, ((weight,), biases) = autocast(x, [weight], [] if bias is None else [bias])
    arguments = (x, weight, biases[0] if biases else None, values, index, structure)
    if weight.requires_grad:
        return reference.masked_delta_linear(*arguments)
    return OPERATOR(*arguments)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, structure: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    structure: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if wanted[0] else 0),
        dy.new_empty(dy.shape[-1] if wanted[1] else 0),
        values.new_empty(values.shape if wanted[2] and x is not None else 0),
    )


def _save(
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, str], result: Tensor
) -> Saved:
    x, weight, _, values, index, structure = arguments
    kept = [x] if values.requires_grad else []
    return Saved((weight, values, index, *kept), (structure,))


def _gradients(
    needs: Needs,
    saved: Saved,
    gradients: tuple[Tensor],
    backward: Callable[..., Sequence[Tensor]],
) -> list[Tensor | None]:
    weight, values, index, *kept = saved.tensors
    wanted = [cast("bool", needs[i]) for i in (0, 2, 3)]
    found = backward(
        gradients[0].contiguous(), kept[0] if kept else None, weight, values, index,
        *saved.constants, wanted,
    )  # fmt: skip
    d_x, d_bias, d_values = (g if want else None for g, want in zip(found, wanted, strict=True))
    return [d_x, None, d_bias, d_values, None, None]


OPERATOR: Operator[Tensor] = Operator(
    "masked_delta_linear",
    reference=reference.masked_delta_linear,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake, _fake_backward),
    rule=Rule(_save, _gradients),
)
