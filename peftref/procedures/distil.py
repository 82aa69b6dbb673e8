"""A teacher on the same backbone: a member that is set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftref.errors import CompositionError, TrainingError, unknown_name
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Distil", "DistilArguments", "similarity"]


class DistilArguments(ProcedureArguments):
    """What the student learns from.

    Attributes:
        teacher: member that is set aside (coupling ``freeze`` with ``aside``).
        student: member that is compared with it for the score.
        match: ``logits`` (divergence of the distributions), ``hidden`` (squared difference of the
            last hidden states), or the sum of ``both``.
        weight: of the term; with ``score``, times the similarity of the two members.
        score: ``cosine`` of their tensors, averaged over rows, zero where it is negative.
        temperature: of both distributions.
    """

    teacher: str
    student: str
    match: Literal["logits", "hidden", "both"] = "logits"
    weight: float = Field(default=1.0, ge=0.0)
    score: Literal["none", "cosine"] = "none"
    temperature: float = Field(default=1.0, gt=0.0)


@procedures.register("distil")
class Distil(Procedure[DistilArguments]):
    """``w s (T^2 KL(p_teacher || p_student) + mean (h_teacher - h_student)^2)``.

    The teacher is the same model with other edits, evaluated once a step without gradient;
    ``s = max(0, cos)``. Hinton et al. 2015, https://arxiv.org/abs/1503.02531; with the score
    PANDA, Zhong et al. 2022, https://arxiv.org/abs/2208.10160
    """

    name = "distil"
    Arguments = DistilArguments

    def __init__(self, arguments: DistilArguments) -> None:
        super().__init__(arguments)
        self._adapter: Adapter | None = None

    @property
    def per_step(self) -> bool:
        return self.arguments.weight > 0

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        for member in (self.arguments.teacher, self.arguments.student):
            if member not in members:
                what = unknown_name("member", member, list(members))
                raise CompositionError(f"distil: {what}")

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._adapter = adapter
        edits = [edit.write for module in adapter.plan.modules for edit in module.edits]
        if not any(w.aside for w in edits if w.member == self.arguments.teacher):
            raise CompositionError(
                f"distil: member {self.arguments.teacher!r} is no teacher, since it takes part in "
                "every forward; write {freeze: {members: [...], aside: true}}"
            )
        if self.arguments.match != "logits":
            self._ask_for_states(adapter.model, wanted=True)

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        if self.arguments.match != "logits":
            self._ask_for_states(adapter.model, wanted=False)

    @staticmethod
    def _ask_for_states(model: nn.Module, *, wanted: bool) -> None:
        """Let the student's own forward hand its states out, so that no second one is needed."""
        config: Any = model.config
        config.output_hidden_states = wanted

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        import torch

        a, adapter = self.arguments, self._adapter
        if a.weight == 0.0 or adapter is None:
            return None
        weight = a.weight
        if a.score == "cosine":
            weight *= max(0.0, similarity(*(adapter.tensors((m,)) for m in (a.teacher, a.student))))
        if weight == 0.0:
            return None
        with adapter.aside() as teacher, torch.no_grad():
            teacher.eval()
            try:
                known = teacher(**inputs)
            finally:
                teacher.train()
        terms: list[Tensor] = []
        if a.match != "hidden":
            terms.append(self._divergence(outputs.logits, known.logits, inputs))
        if a.match != "logits":
            terms.append(_distance(outputs, known, inputs))
        return weight * torch.stack(terms).sum()

    def _divergence(self, own: Tensor, known: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        from torch.nn.functional import kl_div, log_softmax, mse_loss

        if own.shape[-1] == 1:
            return mse_loss(own, known)  # one output is a number, and no distribution
        t, labels = self.arguments.temperature, inputs.get("labels")
        p, q = log_softmax(own / t, -1), log_softmax(known / t, -1)
        each = t**2 * kl_div(p, q, reduction="none", log_target=True).sum(-1)
        if labels is None or labels.shape != each.shape or each.dim() < 2:
            return each.mean()
        real = (labels != -100).to(each.dtype)
        return (each * real).sum() / real.sum().clamp(min=1)


def _distance(own: Any, known: Any, inputs: Mapping[str, Any]) -> Tensor:  # noqa: ANN401
    """Mean squared difference of the last hidden states at real tokens."""
    name = "hidden_states" if own.get("hidden_states") is not None else "decoder_hidden_states"
    if own.get(name) is None:
        raise TrainingError("distil: this model gives no hidden states; use match: logits")
    difference = (own[name][-1] - known[name][-1]).square().mean(-1)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != difference.shape:
        return difference.mean()
    real = mask.to(difference.dtype)
    return (difference * real).sum() / real.sum().clamp(min=1)


def similarity(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the cosine of two members: their tensors, averaged over rows, side by side.

    Raises:
        TrainingError: the members have tensors of other shapes.
    """
    import torch

    sides: list[Tensor] = []
    for tensors in (first, second):
        means = [t.detach().float().flatten(1).mean(0) if t.dim() > 1 else t.detach().float()
                 for t in tensors.values() if t.is_floating_point()]
        sides.append(torch.cat(means) if means else torch.zeros(0))
    if sides[0].shape != sides[1].shape:
        raise TrainingError(
            "distil: score cosine compares members of one technique and width; "
            f"found {len(sides[0])} and {len(sides[1])} entries"
        )
    return float(torch.nn.functional.cosine_similarity(*sides, dim=0))
