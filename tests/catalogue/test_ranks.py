"""Techniques whose ranks change while they train, against PEFT and their formulas."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from scipy import stats
from torch import Tensor, nn

import peftref
from peftref.errors import CompositionError, TrainingError
from peftref.procedures.nested_ranks import leading_ranks
from peftref.procedures.rank_budget import budget_at
from peftref.procedures.soft_threshold import shrink
from peftref.procedures.triplets import orthogonality, triplets
from tests.backbone.tiny import tiny
from tests.catalogue.proof import (
    assert_follows,
    assert_identity,
    assert_known_weights,
    assert_reached,
    assert_same_as_peft,
    attach,
    batch,
    count,
    initial,
)
from tests.parity.peft_pairs import logits

D, L, R = 32, 2, 6
QV = 2 * L  # adapted modules of attention.{query,value}
SITE = "site='attention.{query,value}'"


@pytest.mark.parametrize(("spec", "expected"), [
    (f"adalora(rank=6, {SITE})", QV * (2 * D * R + R)),
    (f"sora(rank=6, {SITE})", QV * (2 * D * R + R)),
    ("dylora(rank=6)", QV * 2 * D * R),
    ("delta_lora(rank=6)", QV * 2 * D * R),
    (f"increlora(capacity=6, {SITE})", QV * (2 * D * R + R)),
    ("eva(rank=3, rho=2)", QV * 2 * D * R),
])
def test_count(spec: str, expected: int) -> None:
    assert count(spec) == expected


def test_initial_values_and_identity() -> None:
    assert_follows(initial("adalora", "right.weight"), stats.norm(0, 0.02))
    assert_follows(initial("adalora", "left.weight"), stats.norm(0, 0.02))
    assert_follows(initial("sora", "values"), stats.norm(0, 1))
    for spec in ("adalora", "sora", "dylora", "delta_lora", "increlora"):
        assert_identity(spec)
    assert_reached("dylora")


def test_adalora_is_pefts() -> None:
    def names(layer: nn.Module, _: str) -> dict[str, object]:
        part = "default"
        return {"right.weight": (layer.lora_A[part], lambda t: t),
                "values": (layer.lora_E[part], lambda t: t),
                "left.weight": (layer.lora_B[part], lambda t: t)}

    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=6, total_step=10,
                                target_modules=["query", "value"], task_type="SEQ_CLS")
    # PEFT divides by r + 1e-5 where the paper divides by r.
    assert_same_as_peft("bert", f"adalora(rank=6, alpha={6 * 6 / (6 + 1e-5)}, {SITE})", config,
                        names)


@pytest.mark.parametrize("step", range(1, 21))
def test_the_budget_is_pefts(step: int) -> None:
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config = SimpleNamespace(tinit=3, tfinal=5, total_step=20, deltaT=1)
    allocator.init_bgt, allocator.target_bgt = 40, 12
    assert budget_at(step, 20, 40, 12, 3, 5) == allocator.budget_schedule(step)[0]


def _train(adapted: peftref.Adapted, steps: int, rate: float = 0.05) -> list[dict[str, Tensor]]:
    """Run steps with all moments of the procedures; return the tensors after each."""
    adapted.handled = True
    model, history = adapted.model, []
    adapted.optimiser = optimiser = torch.optim.SGD(adapted.trainable.values(), lr=rate)
    rows = batch()
    rows["labels"] = torch.tensor([0, 2])
    for step in range(steps):
        for procedure in adapted.procedures:
            procedure.before_step(adapted, step, steps)
        optimiser.zero_grad()
        outputs = model(**rows)
        loss = outputs.loss
        for procedure in adapted.procedures:
            extra = procedure.loss(model, rows, outputs)
            loss = loss if extra is None else loss + extra
        loss.backward()
        for moment in ("after_backward", "step", "after_step"):
            if moment == "step":
                optimiser.step()
                continue
            for procedure in adapted.procedures:
                getattr(procedure, moment)(adapted, step, steps)
        history.append({n: t.detach().clone() for n, t in adapted.tensors().items()})
    return history


def test_adalora_cuts_the_ranks_that_peft_cuts() -> None:
    """The same tensors and gradients, step by step, through PEFT's own allocator."""
    spec = f"adalora(rank=6, target=2, warmup=0.2, final=0.3, orthogonality=0.0, {SITE})"
    ours = attach(spec, moved=False)
    for part in triplets(ours, "test"):
        part.values.data.normal_(generator=torch.Generator().manual_seed(len(part.name)))
    twin = {n: nn.Parameter(t.detach().clone()) for n, t in ours.trainable.items()}
    renamed = {n: n.replace(".", "_").replace("_delta_right_weight", ".lora_A.default")
               .replace("_delta_left_weight", ".lora_B.default")
               .replace("_delta_values", ".lora_E.default") for n in twin}
    theirs = SimpleNamespace(named_parameters=lambda: [(renamed[n], p) for n, p in twin.items()])
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config = SimpleNamespace(tinit=4, tfinal=6, total_step=20, deltaT=1)
    allocator.adapter_name, allocator.beta1, allocator.beta2 = "default", 0.85, 0.85
    allocator.reset_ipt()
    allocator.init_bgt, allocator.target_bgt = 6 * QV, 2 * QV
    (procedure,) = ours.procedures
    pattern = None
    for step in range(20):
        generator = torch.Generator().manual_seed(100 + step)
        for name, tensor in ours.trainable.items():
            gradient = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            for each in (tensor, twin[name]):
                each.grad = gradient.clone().view(each.shape)
                each.data.add_(gradient.view(each.shape), alpha=-0.05)
        procedure.after_step(ours, step, 20)
        done = step + 1
        shaped = {n: p.data for n, p in twin.items()}
        for name, p in twin.items():
            if "lora_E" in renamed[name] and p.dim() == 1:
                p.data, p.grad = p.data[:, None], p.grad[:, None] if p.grad is not None else None
        if done > 14:
            # PEFT's users call it so: a last choice at the begin of the final phase, then masks.
            if pattern is None:
                _, pattern = allocator.update_and_allocate(theirs, done, force_mask=True)
            else:
                allocator.mask_using_rank_pattern(theirs, pattern)
        elif done <= 4:
            allocator.update_and_allocate(theirs, done)
        else:
            allocator.update_and_allocate(theirs, done)
        for name, tensor in ours.trainable.items():
            expected = twin[name].detach().view(tensor.shape)
            torch.testing.assert_close(tensor.detach(), expected, msg=f"{step} {name}")
        assert shaped.keys() == twin.keys()
    left = sum(int((p.values != 0).sum()) for p in triplets(ours, "test"))
    assert left == 2 * QV


def test_orthogonality_is_the_mean_of_both_factors_norms() -> None:
    adapted = attach(f"adalora(rank=3, layers=[0], {SITE})")
    parts = triplets(adapted, "test")
    terms = []
    for part in parts:
        for gram in (part.right @ part.right.T, part.left.T @ part.left):
            terms.append(np.linalg.norm((gram.detach() - torch.eye(3)).numpy()))
    found = orthogonality(parts)
    assert found is not None
    assert float(found.detach()) == pytest.approx(np.mean(terms), rel=1e-12)


def test_a_target_above_the_rank_is_refused() -> None:
    adapted = attach(f"adalora(rank=2, target=4, {SITE})", moved=False)
    with pytest.raises(TrainingError, match="above"):
        _train(adapted, 2)


@pytest.mark.parametrize(("value", "expected"), [(0.15, 0.05), (-0.15, -0.05), (0.05, 0.0)])
def test_shrinking_is_the_proximal_map(value: float, expected: float) -> None:
    found = shrink(torch.tensor(value, dtype=torch.float64), 0.1)
    assert float(found) == pytest.approx(expected)
    grid = torch.linspace(-1, 1, 200001, dtype=torch.float64)
    cost = (grid - value) ** 2 / 2 + 0.1 * grid.abs()
    assert float(grid[cost.argmin()]) == pytest.approx(expected, abs=1e-5)


def test_sora_shrinks_by_rate_times_weight() -> None:
    adapted = attach(f"sora(rank=4, sparsity=3.0, {SITE})", moved=False)
    before = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    after = _train(adapted, 1, rate=0.05)[0]
    for name, value in after.items():
        if name.endswith("values"):  # B is zero at first, so no gradient moves the values
            torch.testing.assert_close(value, shrink(before[name], 0.05 * 3.0))
    whole = _train(attach(f"sora(rank=4, sparsity=100.0, {SITE})", moved=False), 3)[-1]
    assert all(not value.any() for name, value in whole.items() if name.endswith("values"))


def test_dylora_uses_the_leading_ranks_of_the_step() -> None:
    adapted = attach("dylora(rank=5)")
    model, rows = adapted.model, batch()
    adapted.handled = True
    (procedure,) = adapted.procedures
    model.train()
    for step in range(6):
        procedure.before_step(adapted, step, 6)
        b = leading_ranks(step, 1, 5)
        plain = attach("lora(rank=5, alpha=16)", moved=False)
        for name, tensor in plain.tensors().items():
            twin = adapted.tensors()[name.replace(".lora.", ".dylora.")].detach().clone()
            (twin[b:] if name.endswith("down.weight") else twin[:, b:]).zero_()
            tensor.data.copy_(twin)
        torch.testing.assert_close(logits(model, rows), logits(plain.model, rows),
                                   rtol=0, atol=1e-10)
    model.eval()
    assert_known_weights(adapted, lambda w, t: w + 16 / 5 * t["up.weight"] @ t["down.weight"])


def test_dylora_moves_the_last_rank_only_when_asked() -> None:
    adapted = attach("dylora(rank=5, update='last')")
    start = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    after = _train(adapted, 1)[0]
    b = leading_ranks(0, 1, 5) - 1
    for name, tensor in after.items():
        if name.endswith(("down.weight", "up.weight")):
            moved = (tensor - start[name]).abs().amax(1 if name.endswith("down.weight") else 0)
            assert moved.nonzero().flatten().tolist() == [b]


def test_delta_lora_goes_along_with_the_factors() -> None:
    adapted = attach("delta_lora(rank=3, alpha=6, rate=0.5, begin=0.0)")
    start = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    after = _train(adapted, 4)[-1]
    for name, value in after.items():
        if not name.endswith("followed"):
            continue
        near = name.replace(".weight.followed", ".delta.")
        change = (after[f"{near}up.weight"] @ after[f"{near}down.weight"]
                  - start[f"{near}up.weight"] @ start[f"{near}down.weight"])
        torch.testing.assert_close(value, 0.5 * 2.0 * change, rtol=0, atol=1e-12)
    assert_known_weights(adapted, lambda w, t: w + t["followed"] + 2 * t["up.weight"]
                         @ t["down.weight"])


def test_increlora_grows_to_its_target() -> None:
    spec = f"increlora(target=3, capacity=6, warmup=0.1, every=1, sites=2, gain=1, {SITE})"
    adapted = attach(spec, moved=False)
    (procedure,) = adapted.procedures
    history = _train(adapted, 20)
    ranks = [{n: int((t > 0).sum()) for n, t in state.items() if n.endswith("active")}
             for state in history]
    assert set(ranks[0].values()) == {2}  # one rank, and one that trains ahead
    assert sum(ranks[-1].values()) == 3 * QV  # the budget is spent: none trains ahead
    assert max(ranks[-1].values()) > 3 > min(ranks[-1].values())
    for name, mask in history[-1].items():
        if name.endswith("active"):
            used = int((mask > 0).sum())
            expected = torch.where(torch.arange(6) < used, 1 / (used + 1e-5), 0.0)
            torch.testing.assert_close(mask, expected.to(mask.dtype))
    held = copy.deepcopy(procedure.state_dict())
    other = type(procedure)(procedure.arguments)
    other.load_state_dict(held)
    assert other.state_dict() == held


def test_increlora_scores_by_the_gradient_of_the_whole_update() -> None:
    adapted = attach(f"increlora(target=2, capacity=4, {SITE}, orthogonality=0.0)", moved=False)
    for part in triplets(adapted, "test"):
        part.values.data.fill_(0.7)
    (procedure,) = adapted.procedures
    adapted.handled = True
    procedure.before_step(adapted, 0, 10)
    rows = {**batch(), "labels": torch.tensor([0, 2])}
    parts = {p.name: p for p in triplets(adapted, "test")}
    loss = adapted.model(**rows).loss
    loss.backward()
    procedure.after_backward(adapted, 0, 10)
    # The same gradient through a difference of the weight that is formed.
    twin = peftref.attach(adapted.model, "full(site='attention.{query,value}')", name="probe")
    adapted.model.zero_grad()
    adapted.model(**rows).loss.backward()
    weights = {n: t.grad for n, t in twin.trainable.items() if n.endswith("weight.delta")}
    assert len(weights) == QV
    for name, part in parts.items():
        (gradient,) = [g for n, g in weights.items() if n.split(".full")[0] in name]
        change = (part.left * (part.values * part.others["active"])) @ part.right
        score = float((change.detach() * gradient).abs().sum()) / change.numel() ** 0.5
        assert procedure.state_dict()["mean"][name] == pytest.approx(0.15 * score, rel=1e-9)


def test_eva_starts_at_the_principal_components_of_the_inputs() -> None:
    adapted = attach("eva(rank=2, rho=2)", moved=False)
    rows = {**batch(), "labels": torch.tensor([0, 2])}
    rows["attention_mask"][0, -2:] = 0
    seen: dict[str, Tensor] = {}
    paths = {p.owner for p in adapted.planned.values() if p.owner}
    handles = [adapted.model.get_submodule(path).register_forward_pre_hook(
        lambda _m, args, path=path: seen.__setitem__(path, args[0].detach())) for path in paths]
    with adapted.disabled():
        adapted.model(**rows)
    for handle in handles:
        handle.remove()
    adapted.prepare([rows])
    total = 0
    shares: dict[str, np.ndarray] = {}
    for name, tensor in adapted.tensors().items():
        if name.endswith("down.weight"):
            x = seen[adapted.planned[name].owner][rows["attention_mask"].bool()].numpy()
            x = x - x.mean(0)
            _, values, vectors = np.linalg.svd(x, full_matrices=False)
            cosine = np.abs((vectors[:4] * tensor.detach().numpy()).sum(1))
            np.testing.assert_allclose(cosine, 1.0, atol=1e-8)
            shares[name] = values[:4] ** 2 / (values**2).sum()
    best = np.sort(np.concatenate(list(shares.values())))[::-1][: 2 * QV]
    for name, own in shares.items():
        mask = adapted.tensors()[name.replace("down.weight", "active")]
        np.testing.assert_array_equal(mask.numpy() > 0, own >= best[-1] - 1e-12)
        total += int(mask.sum())
    assert total == 2 * QV


def test_what_a_procedure_lacks_is_said() -> None:
    adapted = attach("eva", moved=False)
    adapted.model.train()
    adapted.handled = True
    with pytest.raises(TrainingError, match="needs data"):
        adapted.model(**batch())
    lora = peftref.attach(tiny("bert"), "lora")
    with pytest.raises(CompositionError, match=r"right\.weight"):
        triplets(lora, "rank_budget")
