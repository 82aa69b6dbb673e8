"""A bottleneck and the sum that it goes into, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from peftref.errors import PeftRefError, unknown_name
from peftref.ops.bottleneck import cpu, reference
from peftref.ops.operator import Kernels, Needs, Operator, Rule, Saved
from peftref.ops.precision import autocast

__all__ = ["OPERATOR", "bottleneck"]


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: Tensor,
    *,
    into: Tensor | None = None,
    gate: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """``[into] + [x] + gate * scale * (U phi(D x + b_D) + b_U)``.

    Houlsby et al. 2019 (``residual``), https://arxiv.org/abs/1902.00751; He et al. 2021 (``into``
    and ``scale``), https://arxiv.org/abs/2110.04366. Beside ``x`` the backward pass keeps
    ``D x + b_D`` only. All arguments get gradients.

    Args:
        x: (..., d).
        down: ``D`` (b, d); trained tensors are of the type of ``x`` or wider.
        down_bias: ``b_D`` (b).
        up: ``U`` (k, b).
        up_bias: ``b_U`` (k).
        activation: ``phi``: relu, gelu, gelu_tanh, silu, tanh, sigmoid or identity.
        scale: ().
        into: (..., k), a stream to add to.
        gate: one number a row: of a shape that broadcasts to (..., 1).
        residual: whether ``x`` itself is added.

    Raises:
        PeftRefError: no such activation.
    """
    if activation not in reference.ACTIVATIONS:
        raise PeftRefError(
            "bottleneck: " + unknown_name("activation", activation, reference.ACTIVATIONS)
        )
    x, (streams,) = autocast(x, [] if into is None else [into])
    return OPERATOR(
        x, streams[0] if streams else None, down, down_bias, up, up_bias, scale, gate, activation,
        residual,
    )  # fmt: skip


def _fake(
    x: Tensor,
    into: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    activation: str,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(rows, down.shape[0])


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    activation: str,
    residual: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_up, of_factor = wanted[3] or wanted[4], wanted[5] or wanted[6]
    return (
        dy.new_empty(x.shape if wanted[0] else 0),
        down.new_empty(down.shape if wanted[1] else 0),
        dy.new_empty(hidden.shape[1] if wanted[2] else 0),
        up.new_empty(up.shape if of_up else 0),
        dy.new_empty(0) if up_bias is None or not of_up else up_bias.new_empty(up_bias.shape),
        scale.new_empty(scale.shape) if of_factor else dy.new_empty(0),
        dy.new_empty(0) if gate is None or not of_factor else gate.new_empty(gate.shape),
    )


_Arguments = tuple[
    Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None,
    str, bool,
]  # fmt: skip


def _save(arguments: _Arguments, results: Sequence[Tensor]) -> Saved:
    x, _, down, _, up, up_bias, scale, gate, activation, residual = arguments
    extra = [t for t in (up_bias, gate) if t is not None]
    present = up_bias is not None, gate is not None
    return Saved((x, results[1], down, up, scale, *extra), (*present, activation, residual))


def _gradients(
    needs: Needs,
    saved: Saved,
    gradients: tuple[Tensor],
    backward: Callable[..., Sequence[Tensor]],
) -> list[Tensor | None]:
    has_bias, has_gate, *rest = saved.constants
    x, hidden, down, up, scale, *extra = saved.tensors
    up_bias = extra.pop(0) if has_bias else None
    gate = extra.pop(0) if has_gate else None
    wanted = [cast("bool", needs[i]) for i in (0, 2, 3, 4, 5, 6, 7)]
    dy = gradients[0].contiguous()
    found = backward(dy, x, hidden, down, up, up_bias, scale, gate, *rest, wanted)
    d_x, *others = (g if want else None for g, want in zip(found, wanted, strict=True))
    return [d_x, gradients[0] if needs[1] else None, *others, None, None]


OPERATOR: Operator[Tensor] = Operator(
    "bottleneck",
    reference=reference.bottleneck,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)
