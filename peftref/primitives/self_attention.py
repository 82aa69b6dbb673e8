"""Small self-attention of a stream over its own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SelfAttention", "SelfAttentionArguments"]


class SelfAttentionArguments(Arguments):
    """``width`` of a head; ``output``: initialiser of the projection back."""

    width: int = Field(default=1, gt=0)
    heads: int = Field(default=1, gt=0)
    init: str = "kaiming_uniform"
    output: str = "zeros"


@primitives.register("self_attention")
class SelfAttention(Primitive[SelfAttentionArguments]):
    """``f(x) = concat_h softmax(q_h k_h^T / sqrt(w)) v_h W_o`` with heads of width ``w``.

    It sees what the stack around it sees: no padding, and in a decoder no later token. With
    width 1 it is the tiny-attention adapter, Zhao et al. 2022, https://arxiv.org/abs/2211.01979
    """

    name = "self_attention"
    Arguments = SelfAttentionArguments

    @property
    def _inner(self) -> int:
        return self.arguments.width * self.arguments.heads

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, d = self.arguments, self.place.d_in
        parts = [TensorSpec(f"{self.label}.{name}", (self._inner, d), a.init)
                 for name in ("query", "key", "value")]
        return (*parts, TensorSpec(f"{self.label}.output", (d, self._inner), a.output))

    def algebra(self) -> Algebra:
        zero = self.arguments.output == "zeros"
        return Algebra(keeps_zero=True, zero_at_init=zero, mixes_tokens=True, per_sample=True)

    def flops(self) -> int:
        return 8 * self.place.d_in * self._inner  # scores grow with the length and are left out

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear, scaled_dot_product_attention

        from peftref.ops.visible import visible

        heads, stack = self.arguments.heads, self.place.stack
        causal = stack in ("decoder", "text")

        def attend(x: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
            q, k, v = (linear(x, w).unflatten(-1, (heads, -1)).transpose(-3, -2)
                       for w in (query, key, value))
            seen = visible(runtime.token_mask(stack), x, causal=causal)
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return linear(mixed.transpose(-3, -2).flatten(-2), output)

        return attend
