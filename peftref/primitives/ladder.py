"""A narrow transformer beside the backbone that reads what its layers give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.errors import CompositionError
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ladder", "LadderArguments"]


class LadderArguments(Arguments):
    """``reduction``: the side is so many times narrower; ``heads`` of its attention.

    ``feedforward``: width of its feed-forward parts over its own; ``skip``: every layer whose
    number it divides, 0 included, has no side layer (0: all have one); ``temperature`` of gates.
    """

    reduction: int = Field(default=8, gt=0)
    heads: int = Field(default=4, gt=0)
    feedforward: int = Field(default=4, gt=0)
    skip: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.1, gt=0.0)


@primitives.register("ladder")
class Ladder(Primitive[LadderArguments]):
    """``s = D_0 h_0``, then ``s = B_i(g_i s + (1 - g_i) D_i h_i)``, ``f = U s``.

    ``g_i = sigmoid(a_i / T)``; ``D_i`` (d to d/r) and ``U`` (back) are linears with a bias, ``h_i``
    what layer i gave and ``h_0`` what the first one read, both without gradient. ``B_i`` is a layer
    of width d/r, its norms before its parts: attention over what the stack around it sees, and two
    linears with a GELU. Reads port ``hidden_states``. Ladder side-tuning, Sung, Cho and Bansal
    2022, https://arxiv.org/abs/2206.06522
    """

    name = "ladder"
    Arguments = LadderArguments

    def __init__(self, arguments: LadderArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in % (arguments.reduction * arguments.heads):
            raise CompositionError(
                f"ladder: reduction {arguments.reduction} times heads {arguments.heads} must "
                f"divide the width {place.d_in}"
            )
        if not self.kept_layers:
            raise CompositionError(
                f"ladder: skip {arguments.skip} leaves none of {place.layers} layers; take 0"
            )

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers beside which a side layer stands."""
        skip = self.arguments.skip
        return tuple(i for i in range(self.place.layers) if not skip or i % skip)

    def tensors(self) -> tuple[TensorSpec, ...]:
        d, w = self.place.d_in, self.place.d_in // self.arguments.reduction
        wide = w * self.arguments.feedforward
        found = [*self._linear("first", w, d)]
        for layer in self.kept_layers:
            own = f"layer_{layer}"
            found += [TensorSpec(f"{self.label}.{own}.gate", (), "zeros"),
                      *self._linear(f"{own}.down", w, d), *self._norm(f"{own}.norm_attention", w)]
            found += [self._matrix(f"{own}.{name}", w, w)
                      for name in ("query", "key", "value", "output")]
            found += [*self._norm(f"{own}.norm_ffn", w), *self._linear(f"{own}.wide", wide, w),
                      *self._linear(f"{own}.narrow", w, wide)]
        return (*found, *self._linear("up", d, w))

    def _matrix(self, name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(f"{self.label}.{name}", (rows, columns), "kaiming_uniform")

    def _linear(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        bias = TensorSpec(f"{self.label}.{name}_bias", (rows,), "zeros")
        return self._matrix(name, rows, columns), bias

    def _norm(self, name: str, width: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(f"{self.label}.{name}", (width,), "ones"),
                TensorSpec(f"{self.label}.{name}_bias", (width,), "zeros"))

    def algebra(self) -> Algebra:
        return Algebra(mixes_tokens=True, per_sample=True)

    @property
    def kept(self) -> int:
        w = self.place.d_in // self.arguments.reduction
        # Mixed, two norms and their results, q, k, v, what they give twice, wide and its GELU.
        return self.width + len(self.kept_layers) * w * (11 + 2 * self.arguments.feedforward)

    def flops(self) -> int:
        return 2 * sum(spec.size for spec in self.tensors() if len(spec.shape) == 2)

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

        from peftref.ops.visible import visible

        heads, stack, temperature = self.arguments.heads, self.place.stack, (
            self.arguments.temperature)
        causal, kept = stack in ("decoder", "text"), self.kept_layers

        def side(s: Tensor, t: tuple[Tensor, ...], seen: Tensor | None) -> Tensor:
            h = layer_norm(s, s.shape[-1:], t[0], t[1])
            q, k, v = (linear(h, w).unflatten(-1, (heads, -1)).transpose(-3, -2) for w in t[2:5])
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen)
            s = s + linear(mixed.transpose(-3, -2).flatten(-2), t[5])
            h = layer_norm(s, s.shape[-1:], t[6], t[7])
            return s + linear(gelu(linear(h, t[8], t[9])), t[10], t[11])

        def climb(states: Tensor, *tensors: Tensor) -> Tensor:
            states = states.detach()
            s = linear(states[0], tensors[0], tensors[1])
            seen = visible(runtime.token_mask(stack), s, causal=causal)
            for rung, layer in enumerate(kept):
                t = tensors[2 + 15 * rung : 17 + 15 * rung]
                opened = torch.sigmoid(t[0] / temperature)
                s = opened * s + (1 - opened) * linear(states[layer + 1], t[1], t[2])
                s = side(s, t[3:], seen)
            return linear(s, tensors[-2], tensors[-1])

        return climb
