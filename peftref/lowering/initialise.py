"""First values of adapter tensors: the same for the same seed and name, in any order."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftref.errors import SpecError
from peftref.ir.primitive import FROM_BACKBONE, TensorSpec

__all__ = ["initial_tensor"]

_CALL = re.compile(r"(?P<name>[a-z_]+)(?:\((?P<value>[-+0-9.e]+)\))?")
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
    if found is None or found["name"] not in {**_DRAWS, **_FROM_WEIGHT}:
        known = ", ".join(sorted({**_DRAWS, **_FROM_WEIGHT}))
        raise SpecError(f"Unknown initialiser {spec.init!r} of {name}. Available: {known}")
    key = f"{seed}:{name}" if spec.seed is None else f"{spec.seed}:{spec.name}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    )
    if found["name"] in _FROM_WEIGHT:
        if weight is None:
            raise SpecError(f"{name}: initialiser {spec.init!r} needs the backbone's own tensor")
        frozen = weight().detach().cpu()
        wide = frozen.to(torch.promote_types(frozen.dtype, torch.float32))
        return _FROM_WEIGHT[found["name"]](wide, shape, generator)
    value = float(found["value"]) if found["value"] else math.nan
    return _DRAWS[found["name"]](shape, value, generator)


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


def _paired(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Rows uniform in +-bound, each twice."""
    return _uniform(bound, (shape[0] // 2, *shape[1:]), generator).repeat_interleave(2, 0)


_DRAWS: dict[str, Draw] = {
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
}


def _weight_norm(weight: Tensor, _shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    """Norm of each output neuron's inputs."""
    return weight.norm(dim=1)


def _vocabulary(weight: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Embeddings of tokens drawn without replacement from the 5,000 lowest ids.

    Vocabularies are ordered by frequency, so these are frequent tokens (Lester et al. 2021).
    """
    pool = min(5000, weight.shape[0])
    rows = torch.randperm(pool, generator=generator)
    return weight[rows[torch.arange(shape[0]) % pool]].clone()


_FROM_WEIGHT: dict[str, Callable[[Tensor, tuple[int, ...], torch.Generator], Tensor]] = dict(
    zip(FROM_BACKBONE, (_vocabulary, _weight_norm), strict=True)
)
