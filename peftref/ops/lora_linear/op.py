"""Frozen linears with low-rank updates, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from peftref.ops.choice import Form, choose
from peftref.ops.lora_linear import cpu, reference
from peftref.ops.lora_linear.eager import Single, suits
from peftref.ops.operator import Kernels, Needs, Operator, Rule, Saved
from peftref.ops.precision import autocast
from peftref.ops.seed import draw_seed

__all__ = ["OPERATOR", "lora_linear", "lora_linears"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = W x + b + B (s * A dropout(x))``; see ``lora_linears``."""
    if choose(x) is Form.DIRECT and suits(x, weight, down, up, scale):
        if p == 0:
            seed = None
        elif seed is None:
            seed = draw_seed(x)
        return Single.apply(x, weight, bias, down, up, scale.item(), p, seed)
    biases = [] if bias is None else [bias]
    return lora_linears(x, [weight], biases, [down], [up], [scale], p, seed)[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``y_i = W_i x + b_i + B_i (s_i * A_i dropout(x))``, for targets that read one stream.

    LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685. Beside ``x`` the backward pass keeps
    ``A x`` only; of dropout it keeps the seed. Everything but ``W`` gets a gradient; where a ``W``
    needs one, the plain form runs.

    Args:
        x: (..., d).
        weights: (k_i, d), frozen.
        biases: (k_i), or none at all.
        downs: ``A_i`` (r_i, d), in the type of ``x`` or a wider one; gradients have their type.
        ups: ``B_i`` (k_i, r_i).
        scales: ``s_i`` () or (r_i); tensors, since a number that changes would compile anew.
        p: the dropout's share, 0 outside training; the targets share a mask.
        seed: of the mask (2,) int32; drawn from torch's generator when not given.
    """
    x, (weights, biases) = autocast(x, list(weights), list(biases))
    if p and seed is None:
        seed = draw_seed(x)
    trained = list(downs), list(ups), list(scales)
    if any(weight.requires_grad for weight in weights):
        return reference.lora_linear(x, weights, biases, *trained, p, seed if p else None)
    result = OPERATOR(x, weights, biases, *trained, p, seed if p else None)
    return (result,) if isinstance(result, Tensor) else result


def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(rows, sum(down.shape[0] for down in downs))]


def _fake_backward(
    gradients: list[Tensor],
    x: Tensor | None,
    hidden: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    def like(tensors: list[Tensor], which: int) -> list[Tensor]:
        given = wanted[which] and not (which == 2 and x is None)
        return [t.new_empty(t.shape if given else 0) for t in tensors]

    dy = gradients[0]
    shape = (*dy.shape[:-1], weights[0].shape[1])
    bias = [g.new_empty(g.shape[-1] if wanted[1] else 0) for g in gradients]
    return [
        dy.new_empty(shape if wanted[0] else 0),
        *bias, *like(downs, 2), *like(ups, 3), *like(scales, 4),
    ]


_Arguments = tuple[
    Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], float,
    Tensor | None,
]  # fmt: skip


def _save(arguments: _Arguments, results: list[Tensor]) -> Saved:
    x, weights, biases, downs, ups, scales, p, seed = arguments
    trains_down = any(down.requires_grad for down in downs)
    held = [results[-1], *weights, *downs, *ups, *scales]
    held += [x] * trains_down + ([] if seed is None else [seed])
    return Saved(held, (len(weights), p, trains_down, seed is not None, bool(biases)))


def _gradients(
    needs: Needs,
    saved: Saved,
    gradients: Sequence[Tensor | None],
    backward: Callable[..., list[Tensor]],
) -> Sequence[Tensor | Sequence[Tensor | None] | None]:
    count, p, trains_down, drops, has_bias = cast(
        "tuple[int, float, bool, bool, bool]", saved.constants
    )
    hidden, *rest = saved.tensors
    weights, downs, ups, scales = (rest[i * count : (i + 1) * count] for i in range(4))
    others = rest[4 * count :]
    x = others.pop(0) if trains_down else None
    seed = others.pop(0) if drops else None
    lists = [cast("Sequence[bool]", needs[i]) for i in (2, 3, 4, 5)]
    wanted = [cast("bool", needs[0]), *(any(each) for each in lists)]
    full = _materialised(gradients, weights)
    found = backward(full, x, hidden, weights, downs, ups, scales, p, seed, wanted)
    groups = [found[1 + i * count : 1 + (i + 1) * count] for i in range(4)]
    if not has_bias:
        groups[0] = []
    each = [
        [g if need else None for g, need in zip(group, of_group, strict=True)]
        for group, of_group in zip(groups, lists, strict=True)
    ]
    return [found[0] if wanted[0] else None, [None] * count, *each, None, None]


def _materialised(gradients: Sequence[Tensor | None], weights: list[Tensor]) -> list[Tensor]:
    """Zeros for an output that nothing reads."""
    rows = next(g.shape[:-1] for g in gradients if g is not None)
    return [
        weight.new_zeros(*rows, weight.shape[0]) if g is None else g.contiguous()
        for g, weight in zip(gradients, weights, strict=True)
    ]


OPERATOR: Operator[Tensor | tuple[Tensor, ...]] = Operator(
    "lora_linear",
    reference=reference.lora_linear,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)
