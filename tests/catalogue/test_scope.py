"""What a technique asks of training is about its own tensors, in whatever company it is."""

from __future__ import annotations

import pytest
import torch

from tests.catalogue.proof import attach, batch

SITE = "site='attention.{query,value}'"


def _run(expression: str, moments: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], ...]:
    """Tensors of the plain LoRA beside it, before and after the moments of one step."""
    adapted = attach(expression, moved=False)
    adapted.handled = True
    before = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    rows = {**batch(), "labels": torch.tensor([0, 2])}
    if adapted.plan.properties.needs_data:
        adapted.prepare([rows])
    adapted.optimiser = torch.optim.SGD(adapted.trainable.values(), lr=0.1)
    for procedure in adapted.procedures:
        procedure.before_step(adapted, 0, 10)
    for parameter in adapted.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    for moment in moments:
        for procedure in adapted.procedures:
            getattr(procedure, moment)(adapted, 0, 10)
    after = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    gradients = {n: p.grad.clone() for n, p in adapted.trainable.items() if p.grad is not None}
    member = {n: p.member for n, p in adapted.planned.items()}
    other = [n for n in before if member[n] == "lora"]
    assert other
    return ({n: before[n] for n in other}, {n: after[n] for n in other},
            {n: gradients[n] for n in other})


@pytest.mark.parametrize(("expression", "moments"), [
    ("eva + lora", ()),
    ("dylora(update='last') + lora", ("after_backward",)),
    ("child_tuning_f + lora", ("after_backward",)),
    ("delta_lora(begin=0.0) + lora", ("after_backward", "after_step")),
])
def test_the_lora_beside_it_is_left_alone(expression: str, moments: tuple[str, ...]) -> None:
    before, after, gradients = _run(expression, moments)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert torch.equal(gradients[name], torch.ones_like(value)), name


def test_two_procedures_over_ranks_have_their_own() -> None:
    adapted = attach(f"adalora(rank=4, target=2, {SITE}) + sora(rank=3, sparsity=5.0, {SITE})",
                     moved=False)
    names = {p.name: p.arguments.members for p in adapted.procedures}
    assert names == {"rank_budget": "adalora", "soft_threshold": "sora"}
