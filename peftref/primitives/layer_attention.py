"""A mixture of the states of all layers, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerAttention", "LayerAttentionArguments"]


class LayerAttentionArguments(Arguments):
    """``detach``: let no gradient into the layers, whatever else is trained in them."""

    init: str = "normal(0.02)"
    detach: bool = False


@primitives.register("layer_attention")
class LayerAttention(Primitive[LayerAttentionArguments]):
    """``f(h) = sum_j a_j h_j``, ``a = softmax_j(q . h_j)``: the states of a token in all layers.

    Reads port ``hidden_states`` of a stack, (layers + 1, batch, tokens, d); ``q`` (d) is trained.
    AttentionFusion, Cao et al. 2022, https://aclanthology.org/2022.naacl-main.260
    """

    name = "layer_attention"
    Arguments = LayerAttentionArguments

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(f"{self.label}.query", (self.place.d_in,), self.arguments.init),)

    def algebra(self) -> Algebra:
        return Algebra()

    def flops(self) -> int:
        return 4 * self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        def mix(states: Tensor, query: Tensor) -> Tensor:
            states = states.detach() if self.arguments.detach else states
            shares = (states @ query).softmax(0)
            return (shares[..., None] * states).sum(0)

        return mix
