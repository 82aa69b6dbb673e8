"""Properties 2, 3 and 10: the backbone stays, the numbers are right, every parameter is reached."""

from __future__ import annotations

import torch
from hypothesis import event, given

from peftref.adapted import Adapted
from tests.properties.backbones import Case, attached, batch, cases, examples

STEPS = 3


def steps(adapted: Adapted, *, weight_decay: float = 0.1) -> set[str]:
    """Take AdamW steps on a loss that sees every output; return what had a gradient."""
    given_batch = batch(_family(adapted), batch=3, length=9)
    groups = adapted.parameter_groups(lr=0.02, weight_decay=weight_decay)
    optimiser = torch.optim.AdamW(groups)
    reached: set[str] = set()
    for _ in range(STEPS):
        logits = adapted.model(**given_batch).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        (weights * logits).sum().backward()
        reached |= {n for n, p in adapted.trainable.items()
                    if p.grad is not None and bool((p.grad != 0).any())}
        optimiser.step()
        optimiser.zero_grad()
    return reached


def _family(adapted: Adapted) -> str:
    return adapted.plan.table.family


@examples(30)
@given(cases())
def test_the_backbone_is_frozen(case: Case):
    """Bit for bit after steps with weight decay in training mode, and never a gradient."""
    with attached(case) as adapted:
        own = {id(p) for p in (*adapted.trainable.values(), *adapted.head.values())}
        frozen = {n: p for n, p in adapted.model.named_parameters() if id(p) not in own}
        before = {n: p.detach().clone() for n, p in frozen.items()}
        buffers = {n: b.clone() for n, b in adapted.model.named_buffers()}
        head = {n: p.detach().clone() for n, p in adapted.head.items()}
        adapted.model.train()
        try:
            steps(adapted)
        finally:
            adapted.model.eval()
        assert all(torch.equal(p, before[n]) for n, p in frozen.items())
        assert all(p.grad is None and not p.requires_grad for p in frozen.values())
        assert all(torch.equal(b, buffers[n]) for n, b in adapted.model.named_buffers())
        with torch.no_grad():  # the model is shared with the next example
            for name, parameter in adapted.head.items():
                parameter.copy_(head[name])
                parameter.grad = None


@examples(30)
@given(cases())
def test_trained_numbers_are_the_plans(case: Case):
    """Each shared tensor counts once; names, shapes and flags agree with the model's own."""
    with attached(case) as adapted:
        trained = {id(p): p for p in adapted.model.parameters() if p.requires_grad}
        for parameter in adapted.head.values():
            del trained[id(parameter)]
        assert sum(p.numel() for p in trained.values()) == adapted.plan.trainable_parameters
        assert {id(p) for p in adapted.trainable.values()} == set(trained)
        stored = adapted.state_dict()
        assert sum(t.numel() for t in stored.values()) == adapted.plan.stored_parameters
        planned = {t.name: t.spec.shape for t in adapted.plan.tensors}
        assert {n: tuple(t.shape) for n, t in adapted.tensors().items()} == planned


def narrow_relus(adapted: Adapted) -> set[str]:
    """Members whose few rectified units may be off for every token of so small a batch."""
    found: set[str] = set()
    for member in adapted.plan.composition.members:
        values = member.technique.values
        if values.get("activation") == "relu" and int(str(values["bottleneck"])) <= 3:
            found.add(member.name)
    return found


@examples(60)
@given(cases())
def test_every_parameter_is_reached(case: Case):
    """A gradient within three steps, unless a mask leaves nothing of what it flows through."""
    with attached(case) as adapted:
        emptied = {n for n, t in adapted.tensors().items()
                   if n.endswith("_mask") and not bool(t.any())}
        event(f"emptied by a mask: {bool(emptied)}")
        reached = steps(adapted, weight_decay=0.0)
        # Of hard gates that are all closed or all open no score has a gradient.
        missing = {n for n in set(adapted.trainable) - reached if not n.endswith("_scores")}
        modules = {name.rpartition(".")[0].rpartition(".")[0] for name in emptied}
        dead = {t.name for t in adapted.plan.tensors if t.member in narrow_relus(adapted)}
        unexplained = {n for n in missing - dead if not any(n.startswith(m) for m in modules)}
        assert not unexplained
        for parameter in adapted.head.values():
            parameter.grad = None
