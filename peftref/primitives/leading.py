"""The leading entries of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Leading"]


@primitives.register("leading")
class Leading(Primitive[Arguments]):
    """``f(h)_i = h_i`` for ``i < b``, else 0, in training; all entries outside of it.

    ``b`` is one number for the model, set by the procedure ``nested_ranks``. DyLoRA, Valipour et
    al. 2023, https://arxiv.org/abs/2210.07558
    """

    name = "leading"

    def tensors(self) -> tuple[TensorSpec, ...]:
        init = f"constant({self.place.d_in})"
        return (TensorSpec("leading", (), init, trainable=False, share="@nested", buffer=True),)

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, diagonal=True, keeps_zero=True, random=True)

    def flops(self) -> int:
        return self.place.d_in

    def _mask(self, runtime: Runtime, count: Tensor, like: Tensor) -> Tensor:
        import torch

        number = torch.arange(self.place.d_in, device=count.device)
        kept = number < count if runtime.training else number >= 0
        return kept.to(like.dtype)

    def bind(self, runtime: Runtime) -> Operation:
        return lambda h, count: h * self._mask(runtime, count, h)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        def matrix(before: Tensor | None, count: Tensor) -> Tensor:
            if before is None:
                return torch.diag(self._mask(runtime, count, count))
            return self._mask(runtime, count, before)[:, None] * before

        return matrix
