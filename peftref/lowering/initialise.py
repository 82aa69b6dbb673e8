"""First values of adapter tensors: the same for the same seed and name, in any order."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftref.errors import SpecError
from peftref.ir.primitive import TensorSpec
from peftref.lowering.from_weight import FROM_WEIGHT

__all__ = ["initial_tensor"]

_CALL = re.compile(r"(?P<name>[a-z_]+)(?:\((?P<value>[-+a-z0-9.,]+)\))?")
Draw = Callable[[tuple[int, ...], float, torch.Generator], Tensor]


def initial_tensor(
    spec: TensorSpec, name: str, seed: int, weight: Callable[[], Tensor] | None = None
) -> Tensor:
    """Return the first value of a tensor, on the CPU, in float32 or a wider type.

    The generator is seeded from ``seed`` and ``name``, so that the value depends neither on the
    order of creation nor on the process.

    Args:
        spec: shape and initialiser.
        name: full name of the tensor.
        seed: seed of the adapter; a tensor with a seed of its own uses that and its shape.
        weight: gives the backbone tensor at the site, for data-dependent initialisers.

    Raises:
        SpecError: the initialiser is not known.
    """
    copies = spec.stacked or 1
    shape = spec.shape[1:] if spec.stacked else spec.shape
    parts = [_draw(spec, shape, f"{name}#{copy}", seed, weight) for copy in range(copies)]
    return torch.stack(parts) if spec.stacked else parts[0]


def _draw(
    spec: TensorSpec,
    shape: tuple[int, ...],
    name: str,
    seed: int,
    weight: Callable[[], Tensor] | None,
) -> Tensor:
    found = _CALL.fullmatch(spec.init.replace(" ", ""))
    if found is None or found["name"] not in {**_DRAWS, **FROM_WEIGHT}:
        known = ", ".join(sorted({**_DRAWS, **FROM_WEIGHT}))
        raise SpecError(f"Unknown initialiser {spec.init!r} of {name}. Available: {known}")
    key = f"{seed}:{name}" if spec.seed is None else f"{spec.seed}:{spec.name}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    )
    if found["name"] in FROM_WEIGHT:
        if weight is None:
            raise SpecError(f"{name}: initialiser {spec.init!r} needs the backbone's own tensor")
        frozen = weight().detach().cpu()
        wide = frozen.to(torch.promote_types(frozen.dtype, torch.float32))
        given = tuple(found["value"].split(",")) if found["value"] else ()
        return FROM_WEIGHT[found["name"]](wide, shape, given, generator)
    value = _number(found["value"], spec.init, name)
    return _DRAWS[found["name"]](shape, value, generator)


def _number(text: str | None, init: str, name: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise SpecError(f"{name}: {init!r} takes one number, not {text!r}") from None


def _uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _constant(shape: tuple[int, ...], value: float, _: torch.Generator) -> Tensor:
    return torch.full(shape, value)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, 0.02 if math.isnan(std) else std, generator=generator)


def _truncated(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Normal, cut at two standard deviations."""
    tensor = torch.empty(shape)
    std = 0.02 if math.isnan(std) else std
    return nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std, generator=generator)


def _kaiming(shape: tuple[int, ...], _: float, generator: torch.Generator) -> Tensor:
    """Kaiming uniform with a = sqrt(5), as ``nn.Linear``: uniform in +-1/sqrt(fan in)."""
    return _uniform(1 / math.sqrt(shape[-1]), shape, generator)


def _kaiming_relu(shape: tuple[int, ...], _: float, generator: torch.Generator) -> Tensor:
    """Kaiming uniform for relu (VeRA's projections): uniform in +-sqrt(6 / fan in)."""
    return _uniform(math.sqrt(6 / shape[-1]), shape, generator)


def _xavier(shape: tuple[int, ...], _: float, generator: torch.Generator) -> Tensor:
    return _uniform(math.sqrt(6 / (shape[-1] + shape[0])), shape, generator)


def _xavier_normal(shape: tuple[int, ...], _: float, generator: torch.Generator) -> Tensor:
    """Normal with variance 2 / (fan in + fan out), of the last two dimensions."""
    return _normal(shape, math.sqrt(2 / (shape[-1] + shape[-2])), generator)


def _distinct(shape: tuple[int, ...], total: float, generator: torch.Generator) -> Tensor:
    """Different whole numbers below ``total``, ascending."""
    count = math.prod(shape)
    return torch.randperm(int(total), generator=generator)[:count].sort().values.view(shape)


def _paired(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Rows uniform in +-bound, each twice."""
    return _uniform(bound, (shape[0] // 2, *shape[1:]), generator).repeat_interleave(2, 0)


def _near(shape: tuple[int, ...], mean: float, generator: torch.Generator) -> Tensor:
    """Normal around ``mean`` with standard deviation 0.001 (ScaLearn's weights)."""
    return torch.empty(shape).normal_(mean, 0.001, generator=generator)


def _near_eye(shape: tuple[int, ...], value: float, _: torch.Generator) -> Tensor:
    """Ones on the diagonal, ``value`` elsewhere (AdapterFusion's value matrix)."""
    return torch.full(shape, value).fill_diagonal_(1.0)


def _signs(shape: tuple[int, ...], _: float, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


_DRAWS: dict[str, Draw] = {
    "signs": _signs,
    "zeros": lambda shape, value, generator: torch.zeros(shape),
    "ones": lambda shape, value, generator: torch.ones(shape),
    "constant": _constant,
    "normal": _normal,
    "truncated_normal": _truncated,
    "uniform": lambda shape, bound, generator: _uniform(bound, shape, generator),
    "kaiming_uniform": _kaiming,
    "kaiming_uniform_relu": _kaiming_relu,
    "xavier_uniform": _xavier,
    "eye": lambda shape, value, generator: torch.eye(*shape[-2:]).expand(shape).clone(),
    "paired_uniform": _paired,
    "xavier_normal": _xavier_normal,
    "distinct": _distinct,
    "near": _near,
    "near_eye": _near_eye,
}
