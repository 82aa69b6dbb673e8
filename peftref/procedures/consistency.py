"""Two routed forwards must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import TrainingError
from peftref.procedures.base import Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Consistency", "ConsistencyArguments"]


class ConsistencyArguments(ProcedureArguments):
    """``weight``: of the term that is added."""

    weight: float = Field(default=1.0, ge=0.0)


@procedures.register("consistency")
class Consistency(Procedure[ConsistencyArguments]):
    """``w (KL(p2 || p1) + KL(p1 || p2)) / 2`` of two forwards with routes drawn apart.

    The target of each term carries no gradient. AdaMix, Wang et al. 2022,
    https://arxiv.org/abs/2205.12410
    """

    name = "consistency"
    Arguments = ConsistencyArguments

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        if self.arguments.weight == 0.0:
            return None
        first = getattr(outputs, "logits", None)
        if first is None:
            raise TrainingError(
                "consistency: compares distributions over classes or tokens, and this model gives "
                "vectors; use a task with classes, or weight 0"
            )
        if first.shape[-1] == 1:
            raise TrainingError(
                "consistency: with one output the distributions are equal by definition; "
                "use a task with at least two classes, or weight 0"
            )
        second = model(**inputs).logits
        both = divergence(first, second, inputs.get("labels"))
        return self.arguments.weight * both


def divergence(first: Tensor, second: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the mean over samples (or real tokens) of the symmetric divergence.

    Args:
        first: logits (..., classes) of one forward.
        second: those of the other.
        labels: token labels; positions with -100 do not count.
    """
    from torch.nn.functional import kl_div, log_softmax

    p, q = log_softmax(first, -1), log_softmax(second, -1)
    one = kl_div(p, q.detach(), reduction="none", log_target=True).sum(-1)
    other = kl_div(q, p.detach(), reduction="none", log_target=True).sum(-1)
    both = (one + other) / 2
    if labels is None or both.dim() == 1 or labels.shape != both.shape:
        return both.mean()
    real = (labels != -100).to(both.dtype)
    return (both * real).sum() / real.sum().clamp(min=1)
