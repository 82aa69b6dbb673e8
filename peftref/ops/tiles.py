"""What all Triton kernels share: the mask of dropout, and how a kernel is named for compilation.

The only file beside ``ops/*/triton.py`` that imports Triton.
"""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops import seed

__all__ = ["HALVES", "Variant", "architecture", "kept", "padded_rank", "pointers"]

HALVES = ("bf16", "fp16")
"""Types that kernels are compiled for; float32 runs too, and is not tuned."""

_C1 = tl.constexpr(seed.C1)
_C2 = tl.constexpr(seed.C2)
_PLACES = tl.constexpr(seed.PLACES)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel, for compilation without a GPU.

    Attributes:
        signature: type of every argument that is no constant, such as ``*bf16``, ``i32``, ``fp32``.
        constants: values of the ``constexpr`` arguments, and ``None`` for absent pointers.
        architectures: compute capabilities that launch this form.
        unaligned: sizes that are no multiple of 16; without the promise for all other pointers and
            sizes, loads cannot be asynchronous.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, int | bool | str | None] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    architectures: tuple[int, ...] = (80, 90)
    unaligned: tuple[str, ...] = ()


def pointers(dtype: str, *names: str) -> dict[str, str]:
    """Signature entries of pointers to ``dtype``."""
    return dict.fromkeys(names, f"*{dtype}")


def architecture(x: Tensor) -> int:
    """Compute capability that tiles are chosen for: 80 or 90 (and what comes after it)."""
    if x.device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(x.device) >= (9, 0) else 80


def padded_rank(rank: int) -> int:
    """The rank as a tile: tensor cores take 16, 32, 64, ..."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _hash(u):
    u = (u ^ ((u >> 16) & 0xFFFF)) * _C1
    u = (u ^ ((u >> 15) & 0x1FFFF)) * _C2
    return u ^ ((u >> 16) & 0xFFFF)


@triton.jit
def kept(p_seed, i_rows, i_columns, least):
    """``seed.keep`` of a tile (rows, columns)."""
    u = i_rows.to(tl.int32) * _C2 + tl.load(p_seed)
    u = (u ^ (u >> 16)) * (tl.load(p_seed + 1) | 1)
    starts = (u >> 12) & (_PLACES - 1)
    places = starts[:, None] + i_columns.to(tl.int32)[None, :]
    return _hash(places) >= least
