"""First values of adapter tensors that are made from the backbone's own tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.errors import SpecError
from peftref.ops.matrix_parts import leading_qr, leading_svd
from peftref.ops.quantised import Grid, alternate

__all__ = ["FROM_WEIGHT"]

Shape = tuple[int, ...]
Draw = Callable[[Tensor, Shape, tuple[str, ...], torch.Generator], Tensor]
"""``(weight, shape, arguments of the initialiser, generator)``."""


def _weight_norm(weight: Tensor, _: Shape, __: tuple[str, ...], ___: torch.Generator) -> Tensor:
    """Norm of each output neuron's inputs."""
    return weight.norm(dim=1)


def _input_norm(weight: Tensor, _: Shape, __: tuple[str, ...], ___: torch.Generator) -> Tensor:
    """Norm of each input's weights."""
    return weight.norm(dim=0)


def _vocabulary(
    weight: Tensor, shape: Shape, _: tuple[str, ...], generator: torch.Generator
) -> Tensor:
    """Embeddings of tokens drawn without replacement from the 5,000 lowest ids.

    Vocabularies are ordered by frequency, so these are frequent tokens (Lester et al. 2021).
    """
    pool = min(5000, weight.shape[0])
    rows = torch.randperm(pool, generator=generator)
    return weight[rows[torch.arange(shape[0]) % pool]].clone()


def _left(power: float) -> Draw:
    """``U_r (scale S_r)^power``."""

    def draw(weight: Tensor, shape: Shape, given: tuple[str, ...], __: torch.Generator) -> Tensor:
        u, s, _ = leading_svd(weight, shape[1])
        return u * (_scale(given) * s) ** power

    return draw


def _right(power: float) -> Draw:
    """``(scale S_r)^power V_r^T``."""

    def draw(weight: Tensor, shape: Shape, given: tuple[str, ...], __: torch.Generator) -> Tensor:
        _, s, vt = leading_svd(weight, shape[0])
        return ((_scale(given) * s) ** power)[:, None] * vt

    return draw


def _scale(given: tuple[str, ...]) -> float:
    """Of the singular values, so that ``s B A`` is a part of the weight: ``1 / s``."""
    return float(given[0]) if given else 1.0


def _qr(index: int) -> Draw:
    def draw(weight: Tensor, shape: Shape, _: tuple[str, ...], __: torch.Generator) -> Tensor:
        return leading_qr(weight, min(shape))[index]

    return draw


def _loftq(index: int) -> Draw:
    def draw(weight: Tensor, shape: Shape, given: tuple[str, ...], _: torch.Generator) -> Tensor:
        if len(given) != 4 or given[0] not in ("nf4", "int"):
            raise SpecError(
                f"loftq_up and loftq_down take (kind, bits, block, rounds), not {given}"
            )
        grid = Grid("int" if given[0] == "int" else "nf4", int(given[1]), int(given[2]))
        return alternate(weight, grid, min(shape), int(given[3]))[index]

    return draw


FROM_WEIGHT: dict[str, Draw] = {
    "vocabulary": _vocabulary,
    "weight_norm": _weight_norm,
    "input_norm": _input_norm,
    "svd_left": _left(0.0),
    "svd_right": _right(0.0),
    "svd_up": _left(0.5),
    "svd_down": _right(0.5),
    "svd_scaled_right": _right(1.0),
    "qr_up": _qr(0),
    "qr_down": _qr(1),
    "loftq_up": _loftq(1),
    "loftq_down": _loftq(2),
}
"""By name; the same names as ``FROM_BACKBONE``, which plans know without torch."""
