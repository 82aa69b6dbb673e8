"""Partial tuning over time and by scores: phases, trained masks, sparse differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import TrainerCallback

from peftref.procedures.gradient_dropout import GradientDropout, GradientDropoutArguments
from peftref.pruning.straight_through import (
    OPEN,
    expected_open,
    hard_concrete,
    threshold,
    top_k,
)
from tests.catalogue.proof import (
    assert_follows,
    assert_identity,
    assert_known_weights,
    assert_merges,
    assert_reached,
    assert_same_as_peft,
    attach,
    batch,
    count,
    initial,
)
from tests.catalogue.small_training import adapted, train

D, F, L = 32, 48, 2  # width, feed-forward width, layers of the tiny models


def masks(made: Any) -> dict[str, Tensor]:
    return {n.removesuffix("_mask"): t for n, t in made.tensors().items() if n.endswith("_mask")}


def kept(made: Any) -> int:
    return sum(int(mask.sum()) for mask in masks(made).values())


# --- phases ----------------------------------------------------------------------------------


class Values(TrainerCallback):
    """Values and gradients of the trained tensors at every step."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.before: list[dict[str, Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append({n: t.detach().clone() for n, t in self.made.trainable.items()})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.grads.append({n: torch.zeros_like(t) if t.grad is None else t.grad.clone()
                           for n, t in self.made.trainable.items()})


def watched(spec: str, tmp_path: Path, **changes: Any) -> Values:
    made = adapted(spec)
    values = Values(made)
    train(spec, tmp_path, made=made, callbacks=(values,), **changes)
    return values


def test_lt_sft_trains_exactly_the_entries_that_moved_most(tmp_path: Path) -> None:
    values = watched("lt_sft(keep=0.05)", tmp_path, steps=6, learning_rate=1e-3,
                     lr_scheduler_type="constant")
    made = values.made
    total = sum(m.numel() for m in masks(made).values())
    assert kept(made) == round(0.05 * total)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in values.before[3].values())
    for name, mask in masks(made).items():
        end = made.trainable[name].detach()
        assert torch.equal(end * mask, end), name  # cut entries stay at zero
    assert any(bool(t.any()) for t in made.trainable.values())


def test_lt_sft_selects_by_the_end_of_the_first_phase(tmp_path: Path) -> None:
    """A run that ends where the first phase does has the values that are ranked."""
    usual = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    dense = train("full", tmp_path / "a", steps=3, **usual)
    made = train("lt_sft(keep=0.05)", tmp_path / "b", steps=6, **usual)
    sizes = {n: t.detach().abs() for n, t in dense.trainable.items()}
    found = masks(made)
    least = min(float(sizes[n][m == 1].min()) for n, m in found.items() if bool(m.any()))
    most = max(float(sizes[n][m == 0].max()) for n, m in found.items() if bool((m == 0).any()))
    assert least >= most


@pytest.mark.parametrize(("technique", "whole"), [
    ("u_bitfit", False), ("s_bitfit", True), ("u_mam(length=3, bottleneck=4)", False),
    ("s_mam(length=3, bottleneck=4)", True)])
def test_first_order_scores_are_summed_up_over_the_first_phase(
    technique: str, whole: bool, tmp_path: Path
) -> None:
    values = watched(technique, tmp_path, steps=6, learning_rate=1e-2)
    made = values.made
    scores = {}
    for name, mask in masks(made).items():
        score = sum((-values.before[s][name] * values.grads[s][name] for s in range(3)),
                    torch.zeros_like(mask))
        if "s_bitfit" in technique:
            score = score.sum()[None]
        elif whole:
            score = score.reshape(len(score), -1).sum(1)
        scores[name] = score
    groups = sum(s.numel() for s in scores.values())
    flat = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.cat([
        (m.reshape(s.numel(), -1).mean(1) if whole else m.flatten())
        for s, m in zip(scores.values(), masks(made).values(), strict=True)])
    assert set(chosen.tolist()) == {0.0, 1.0}
    assert int(chosen.sum()) == max(1, round(0.5 * groups))
    # Sums in another order; no score is nearer to the border than this.
    assert flat[chosen == 1].min() >= flat[chosen == 0].max() - 1e-9
    start = adapted(technique).trainable
    assert all(torch.equal(values.before[3][n], t) for n, t in start.items())


def test_a_resumed_choice_is_the_same(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2}
    through = train("u_bitfit", tmp_path / "a", **usual)
    train("u_bitfit", tmp_path / "b", save_strategy="steps", save_steps=2, **usual)
    for late in (4, 6):
        (tmp_path / "b" / f"checkpoint-{late}" / "trainer_state.json").unlink()
    resumed = train("u_bitfit", tmp_path / "b", resume=True, **usual)
    for name, tensor in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_diff_pruning_folds_its_gates_and_keeps_the_largest(tmp_path: Path) -> None:
    spec = "diff_pruning(keep=0.02, penalty=1e-4, open=0.5)"
    values = watched(spec, tmp_path, steps=8, learning_rate=1e-3)
    made, before = values.made, values.before[6]
    names = list(masks(made))
    end = {n: values.before[6][n] for n in names}
    assert kept(made) == round(0.02 * sum(m.numel() for m in masks(made).values()))
    for name in names:
        assert torch.equal(before[f"{name}_scores"], torch.full_like(end[name], OPEN))
    found = torch.cat([end[n][masks(made)[n] == 1].abs() for n in names])
    cut = torch.cat([end[n][masks(made)[n] == 0].abs() for n in names])
    assert found.min() >= cut.max()
    assert torch.equal(made.tensors()[f"{names[0]}_scores"], before[f"{names[0]}_scores"])
    made.model.train()
    rows = {k: v % 60 for k, v in batch().items()}
    assert torch.equal(made.model(**rows).logits, made.model(**rows).logits)  # nothing is drawn


def test_the_l0_penalty_closes_gates(tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "composition": "gated", "members": [{"name": "full", "use": "full"}],
        "couplings": [{"mask": {"kind": "hard_concrete", "init": "constant(0.0)"}}]}
    opened = []
    for penalty in (0.0, 1e-2):
        spec["couplings"][0]["mask"]["penalty"] = penalty
        made = train(spec, tmp_path / str(penalty), steps=5, learning_rate=1e-2)
        scores = [t.detach() for n, t in made.trainable.items() if n.endswith("_scores")]
        opened.append(sum(float(expected_open(s)) for s in scores))
    assert opened[1] < 0.99 * opened[0]


# --- masks by scores -------------------------------------------------------------------------


def test_straight_through_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    w, s = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    weights = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    for mask in (top_k(s, 0.4), threshold(s, 0.2)):
        (gradient,) = torch.autograd.grad((w * mask * weights).sum(), s)
        torch.testing.assert_close(gradient, w * weights)
        assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    assert int(top_k(s, 0.4).sum()) == 14
    assert torch.equal(top_k(s, 0.4).detach() == 1, s >= s.flatten().sort().values[-14])
    assert torch.equal(threshold(s, 0.2).detach() == 1, s >= 0.2)


def test_hard_concrete_gates_have_the_distribution_of_the_paper() -> None:
    """P(z = 0) = sigmoid(-a + log(-l / r)) = sigmoid(-a) with l = -r and temperature one."""
    torch.manual_seed(0)
    for score in (-1.0, 0.0, 2.0):
        scores = torch.full((40000,), score)
        drawn = hard_concrete(scores, draw=True)
        # Five deviations of a share of 40,000 draws. Clipped at 0: s <= 1/2; at 1: s >= 5/6.
        closed, opened = float((drawn == 0).float().mean()), float((drawn == 1).float().mean())
        assert closed == pytest.approx(1 / (1 + math.exp(score)), abs=0.0125)
        assert opened == pytest.approx(1 / (1 + math.exp(math.log(5) - score)), abs=0.0125)
        assert float(expected_open(scores[:1])) == pytest.approx(1 - 1 / (1 + math.exp(score)))
    still = hard_concrete(torch.tensor([-9.0, 0.4, 9.0]), draw=False)
    middle = 3 / (1 + math.exp(-0.4)) - 1.5
    torch.testing.assert_close(still, torch.tensor([0.0, middle, 1.0]))
    assert bool((hard_concrete(torch.full((100000,), OPEN), draw=True) == 1).all())


def test_threshold_mask() -> None:
    """W * 1[M >= tau] with the stated first sparsity; the gradient of the scores is W dL/dW'."""
    expression = "threshold_mask(sparsity=0.1, site=attention.query)"
    assert count(expression) == L * D * D
    assert count("threshold_mask") == L * (4 * D * D + 2 * D * F) + D * D
    values = initial("threshold_mask", "scores")
    assert_follows(values, stats.uniform(-0.01, 0.02))
    tau = 0.01 * (2 * 0.1 - 1)
    assert float((values < tau).double().mean()) == pytest.approx(0.1, abs=0.012)
    assert_identity(expression, exact=False)
    assert_reached(expression)

    def plain(weight: Tensor, tensors: Any) -> Tensor:
        scores = tensors["scores"]
        return weight * ((scores >= tau).double() + scores - scores.detach())

    made = attach(expression, size=0.01)
    assert_known_weights(made, plain)
    assert_merges(made)
    assert_merges(attach("threshold_mask + lora", "llama", size=0.01), "llama")


def test_propetl_masks_one_prototype_for_each_layer() -> None:
    expression = "propetl(base='lora(rank=4, layers=all)', keep=0.25)"
    prototype, rows = 2 * 4 * (D + D), 2 * L * 4 * (D + D)
    assert count(expression) == prototype + rows  # query and value; each layer has its scores
    made = attach(expression)
    values = {n: t for n, t in made.trainable.items() if not n.endswith("_scores")}
    assert len(values) == 4
    assert all(not name.startswith("bert") for name in values)

    def mask(scores: Tensor) -> Tensor:
        hard = torch.zeros(scores.numel(), dtype=scores.dtype)
        hard[scores.flatten().argsort()[-round(0.25 * scores.numel()):]] = 1
        return hard.view_as(scores) + scores - scores.detach()

    def plain(weight: Tensor, tensors: Any) -> Tensor:
        down = tensors["down.weight"] * mask(tensors["down.weight_scores"])
        up = tensors["up.weight"] * mask(tensors["up.weight_scores"])
        return weight + 16 / 4 * up @ down

    assert_known_weights(made, plain)
    rates = {round(p["lr"], 9): len(p["params"]) for p in made.parameter_groups(lr=1e-4)}
    assert rates[3e-3] == 2 * 2 * L
    assert_follows(initial("propetl", "down.weight_scores"),
                   stats.uniform(-1 / math.sqrt(D), 2 / math.sqrt(D)))
    assert_reached(expression)


# --- SHiRA, Child-Tuning F -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shira_is_pefts(family: str) -> None:
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    outs = [32, 32] if family == "bert" else [32, 16]
    assert count("shira(rank=2)", family) == L * sum(2 * (32 + out) for out in outs)
    made = attach("shira(rank=2)", family, moved=False)
    positions = [t for n, t in made.tensors().items() if n.endswith("positions")]
    assert all(len(p.unique()) == len(p) and p.dtype == torch.long for p in positions)
    assert not torch.equal(positions[0], positions[2])  # every site has its own
    places = {n.removesuffix(".delta.sparse.positions"): t for n, t in made.tensors().items()
              if n.endswith("positions")}
    config = peft.ShiraConfig(r=2, target_modules=targets)

    def names(layer: Any, path: str) -> Any:
        own = next(t for n, t in places.items() if n.startswith(f"{path}."))
        indices = layer.shira_indices["default"]
        indices.copy_(torch.stack((own // 32, own % 32)))
        return {"sparse.values": (layer.shira_weight["default"], lambda t: t)}

    assert_same_as_peft(family, "shira(rank=2)", config, names)
    assert_identity("shira(rank=2)", family)
    assert_reached("shira(rank=2)", family)


def test_gradient_dropout_is_unbiased_and_binary() -> None:
    class One:
        def __init__(self) -> None:
            self.parameter = torch.nn.Parameter(torch.zeros(40000))
            self.parameter.grad = torch.full((40000,), 2.0)
            self.trainable = {"one": self.parameter}
            self.planned = {"one": None}  # of which member it is matters where one is named

    torch.manual_seed(0)
    one: Any = One()
    GradientDropout(GradientDropoutArguments(keep=0.25)).after_backward(one, 0, 1)
    assert set(one.parameter.grad.unique().tolist()) == {0.0, 8.0}
    assert float(one.parameter.grad.mean()) == pytest.approx(2.0, abs=0.09)  # five deviations


def test_child_tuning_f_moves_with_dropped_gradients_and_no_decay(tmp_path: Path) -> None:
    values = watched("child_tuning_f(keep=0.25)", tmp_path, steps=2, learning_rate=1e-3,
                     weight_decay=0.1)
    first, second = values.before[1], values.made.trainable
    for name, gradient in values.grads[0].items():
        moved = first[name] != 0
        assert torch.equal(moved, gradient != 0), name  # Adam's first step: nothing else moves
        assert not bool(moved.all()) or gradient.numel() < 40
        still = (gradient == 0) & (values.grads[1][name] == 0)
        assert not bool(second[name].detach()[still].any()), name
    decays = {g["weight_decay"] for g in values.made.parameter_groups(weight_decay=0.1)}
    assert decays == {0.0, 0.1}  # the head's is as asked
