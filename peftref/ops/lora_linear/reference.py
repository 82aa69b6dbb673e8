"""The definition of low-rank updates of frozen linears that read one stream."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.seeded_dropout.reference import seeded_dropout

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """``y_i = W_i x + b_i + B_i (s_i * A_i dropout(x))``, for each target ``i``.

    Args:
        x: (..., d).
        weights: (k_i, d).
        biases: (k_i), or an empty list.
        downs: ``A_i`` (r_i, d).
        ups: ``B_i`` (k_i, r_i).
        scales: ``s_i`` () or (r_i).
        p: the dropout's share; the targets share a mask.
        seed: of the mask; not read without dropout.
    """
    dropped = x if p == 0 or seed is None else seeded_dropout(x, p, seed)
    outputs: list[Tensor] = []
    for i, (weight, down, up, scale) in enumerate(zip(weights, downs, ups, scales, strict=True)):
        hidden = linear(dropped, down.to(x.dtype)) * scale.to(x.dtype)
        frozen = linear(x, weight, biases[i] if biases else None)
        outputs.append(frozen + linear(hidden, up.to(x.dtype)))
    return tuple(outputs)
