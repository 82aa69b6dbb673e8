"""A teacher that is another member on the same backbone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftref
from peftref.errors import CompositionError, TrainingError
from peftref.procedures.distil import similarity
from tests.catalogue.proof import assert_merges, attach, batch
from tests.catalogue.small_training import adapted, train
from tests.parity.peft_pairs import logits

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def rows_of(made: Any, member: str) -> Tensor:
    (found,) = made.tensors((member,)).values()
    return found


def alone(rows: Tensor, family: str = "bert") -> Any:
    """A model with one prompt of these rows."""
    made = attach(f"prompt_tuning(length={len(rows)})", family)
    with torch.no_grad():
        rows_of(made, "prompt_tuning").copy_(rows)
    return made


@pytest.fixture
def panda() -> Any:
    made = attach("panda(length=3, temperature=2.0, weight=0.7)")
    with torch.no_grad():  # a teacher not too far off, so that the score is above zero
        rows = rows_of(made, "source")
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(rows.shape, dtype=rows.dtype, generator=generator)
        rows.copy_(rows_of(made, "target") + 0.2 * noise)
    return made


def test_only_the_student_takes_part(panda: Any) -> None:
    student, teacher = (alone(rows_of(panda, name)).model for name in ("target", "source"))
    torch.testing.assert_close(logits(panda.model, batch()), logits(student, batch()), **CLOSE)
    with panda.aside() as model:
        found = logits(model, batch())
    torch.testing.assert_close(found, logits(teacher, batch()), **CLOSE)
    assert not rows_of(panda, "source").requires_grad


def test_the_loss_of_panda_is_its_formula(panda: Any) -> None:
    model, rows = panda.model, {**batch(), "labels": torch.tensor([0, 2])}
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows["attention_mask"][1, -2:] = 0
    (distil,) = [p for p in panda.procedures if p.name == "distil"]
    panda.handled = True
    model.train()
    calls: list[bool] = []
    hook = model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    distil.before_step(panda, 0, 4)
    outputs = model(**rows)
    found = distil.loss(model, rows, outputs)
    distil.after_backward(panda, 0, 4)
    hook.remove()
    assert calls == [True, False]  # one more forward, without gradient
    assert model.training
    assert model(**rows).hidden_states is None
    target, source = rows_of(panda, "target"), rows_of(panda, "source")
    student, teacher = (alone(r).model(**rows, output_hidden_states=True) for r in (target, source))
    p, q = (o.logits.div(2.0).softmax(-1) for o in (teacher, student))
    divergence = 4.0 * (p * (p / q).log()).sum(-1).mean()
    distance = (student.hidden_states[-1] - teacher.hidden_states[-1]).square().mean(-1)
    distance = distance[rows["attention_mask"].bool()].mean()
    a, b = target.detach().mean(0), source.mean(0)
    score = (a @ b / (a.norm() * b.norm())).item()
    assert score > 0.3
    # The score is taken in float32.
    expected = 0.7 * score * (divergence + distance)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(found, [target])
    assert gradient.abs().max() > 1e-6


def test_a_student_follows_its_teacher(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
    source = train("prompt_tuning(length=4)", tmp_path / "s", steps=8, **usual)
    source.save(tmp_path / "source")
    apart: list[float] = []
    for weight in (0.0, 30.0):
        made = train({
            "composition": "kd",
            "members": [{"name": n, "use": "prompt_tuning(length=4)"} for n in ("old", "new")],
            "couplings": [{"freeze": {"members": ["old"], "aside": True}}],
            "procedures": [
                {"start_from": {"member": "old", "artifact": str(tmp_path / "source")}},
                {"distil": {"teacher": "old", "student": "new", "weight": weight}}],
        }, tmp_path / str(weight), steps=12, **usual)
        assert torch.equal(rows_of(made, "old"), rows_of(source, "prompt_tuning"))
        made.model.eval()
        rows = {"input_ids": torch.arange(5, 53).view(4, 12)}
        with torch.no_grad():
            own = made.model(**rows).logits.log_softmax(-1)
            with made.aside() as teacher:
                known = teacher(**rows).logits.log_softmax(-1)
        apart.append(float((known.exp() * (known - own)).sum(-1).mean()))
    assert apart[1] < 0.5 * apart[0]
    made.save(tmp_path / "made")
    shutil.rmtree(tmp_path / "source")
    again = peftref.restore(adapted("bitfit").detach(), tmp_path / "made", check_backbone=False)
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_teacher_does_not_stand_in_the_way_of_merging() -> None:
    made = attach({
        "composition": "kd", "members": [{"name": n, "use": "dora"} for n in ("old", "new")],
        "couplings": [{"freeze": {"members": ["old"], "aside": True}}],
        "procedures": [{"distil": {"teacher": "old", "student": "new"}}]})
    with torch.no_grad():
        for tensor in made.tensors(("old",)).values():
            tensor += 1.0
    assert_merges(made)


def test_what_distillation_needs() -> None:
    members = [{"name": n, "use": "prompt_tuning"} for n in ("old", "new")]
    with pytest.raises(CompositionError, match="distil: Unknown member 'odl'"):
        attach({"composition": "kd", "members": members,
                "procedures": [{"distil": {"teacher": "odl", "student": "new"}}]})
    made = attach({"composition": "kd", "members": members,
                   "procedures": [{"distil": {"teacher": "old", "student": "new"}}]})
    with pytest.raises(CompositionError, match="is no teacher"):
        made.procedures[0].before_step(made, 0, 4)
    with pytest.raises(TrainingError, match="one technique and width"):
        similarity({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)})


def test_mpt_learns_one_source_after_the_other(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"steps": 2, "learning_rate": 0.05}
    train("prompt_tuning(length=4)", tmp_path / "a", **usual).save(tmp_path / "prompt")
    first = train(f"mpt_source(length=4, source='{tmp_path / 'prompt'}')", tmp_path / "b", **usual)
    first.save(tmp_path / "first")
    made = adapted(f"mpt_source(length=4, start='{tmp_path / 'first'}')")
    own = {n: t.clone() for n, t in first.tensors(("mpt",)).items()}
    assert own.keys() == made.trainable.keys()
    assert made.plan.trainable_parameters == 4 * 32 + 4 + 32
    for name, tensor in own.items():
        assert torch.equal(made.tensors()[name], tensor), name
    target = adapted({
        "composition": "target", "members": [{"name": "mpt", "use": "mpt(length=4)"}],
        "procedures": [{"start_from": {"member": "mpt", "artifact": str(tmp_path / "first")}}]})
    for name, tensor in own.items():
        assert torch.equal(target.tensors()[name], tensor), name
