"""Techniques that rotate: orthogonal to rounding, counts of the papers, known answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from scipy import stats
from torch import Tensor, nn
from transformers import Trainer

import peftref
from peftref.errors import CompositionError, PeftRefError
from peftref.procedures.orthogonality import penalty
from peftref.testing.primitive_contract import Case, PrimitiveContract
from tests.backbone.tiny import tiny
from tests.catalogue.proof import (
    assert_follows,
    assert_identity,
    assert_known_maps,
    assert_known_outputs,
    assert_known_weights,
    assert_merges,
    assert_reached,
    assert_same_as_peft,
    attach,
    batch,
    count,
    initial,
)
from tests.catalogue.small_training import train
from tests.parity.peft_pairs import logits, peft_model

ALL = ("boft(block=4, factors=3)", "goft", "goft_scaled", "qgoft", "hra(rank=4)",
       *(f"road(group=8, variant={v})" for v in (1, 2, 4)), "oft(block=8, block_share=True)",
       "coft(block=8)")
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def cayley(entries: Tensor, b: int) -> Tensor:
    """``(I - Q)(I + Q)^-1`` of the skew matrix with this upper triangle, row by row."""
    skew = torch.zeros(b, b, dtype=entries.dtype)
    rows, columns = torch.triu_indices(b, b, 1)
    skew = skew.index_put((rows, columns), entries)
    skew = skew - skew.T
    return (eye(b) - skew) @ torch.linalg.inv(eye(b) + skew)


# --- counts and first values ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "formula"), [
    # (d_in, d_out) of each of the query and value linears of one layer.
    ("boft(block=4, factors=3)", lambda i, o: 3 * (i // 4) * 6 + o),
    ("goft", lambda i, o: i - 1),
    ("goft_scaled", lambda i, o: 2 * i - 1),
    ("qgoft", lambda i, o: 4 * (i - 1)),
    ("hra(rank=4)", lambda i, o: 4 * i),
    ("road(group=8, variant=1)", lambda i, o: o),
    ("road(group=8, variant=2)", lambda i, o: 2 * o),
    ("road(group=8, variant=4)", lambda i, o: 4 * o),
    ("oft(block=8, block_share=True)", lambda i, o: 28),
    ("coft(block=8)", lambda i, o: (i // 8) * 28),
])
def test_counts(family: str, expression: str, formula: Any) -> None:
    widths = [(32, 32), (32, 16 if family == "llama" else 32)]  # llama: 2 of 4 heads for values
    assert count(expression, family) == 2 * sum(formula(*width) for width in widths)


@pytest.mark.parametrize("expression", ALL)
def test_the_start_is_the_backbone_and_everything_trains(expression: str) -> None:
    assert_identity(expression)
    assert_reached(expression)


def test_reflections_start_in_equal_pairs_of_uniform_vectors() -> None:
    rank = 8
    made = attach(f"hra(rank={rank})", moved=False)
    for tensor in made.trainable.values():
        assert torch.equal(tensor[::2], tensor[1::2])
    bound = math.sqrt(2 / rank)  # Kaiming uniform of half the columns: fan in r / 2
    values = torch.cat([t.detach()[::2].flatten() for t in made.trainable.values()])
    assert_follows(values, stats.uniform(-bound, 2 * bound))
    assert set(initial("road(group=8)", "scale").tolist()) == {1.0}
    assert set(initial("road(group=8)", "angle").tolist()) == {0.0}


# --- orthogonal whatever the width -----------------------------------------------------------


def stream_matrix(name: str, arguments: Mapping[str, Any], d: int) -> tuple[Tensor, Tensor]:
    """``R`` of ``f(x) = x R`` at random tensors, and the tensors."""
    case = Case(name, dict(arguments), d_in=d, d_out=d)
    primitive = case.make()
    tensors = PrimitiveContract.tensors(case, start=False)
    return primitive.bind(None)(eye(d), *tensors), tensors[0]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("d", [2, 3, 5, 8, 12, 31, 32])
def test_givens_are_rotations_of_the_pairs_of_the_tree(d: int) -> None:
    found, angles = stream_matrix("givens", {}, d)
    torch.testing.assert_close(found @ found.T, eye(d), rtol=0, atol=1e-14)
    assert torch.linalg.det(found) == pytest.approx(1)
    expected, level = eye(d), 1
    while 2 ** (level - 1) < d:
        for i in range(0, d, 2**level):
            j = i + 2 ** (level - 1)
            if j < d:
                plane, angle = eye(d), angles[j - 1]
                plane[i, i] = plane[j, j] = angle.cos()
                plane[i, j], plane[j, i] = -angle.sin(), angle.sin()
                expected = expected @ plane
        level += 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "arguments", "d"), [
    ("butterfly", {"block": 4, "factors": 3}, 32), ("butterfly", {"block": 2, "factors": 2}, 12),
    ("reflections", {"rank": 6}, 11), ("rotation", {"block": 4, "block_share": True}, 12),
    ("pair_rotation", {"group": 4}, 12),
])
def test_the_others_are_orthogonal(name: str, arguments: Mapping[str, Any], d: int) -> None:
    found, _ = stream_matrix(name, arguments, d)
    if name == "pair_rotation":  # each pair is scaled
        found = found / found.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found @ found.T, eye(d), rtol=0, atol=1e-13)


# --- known answers ---------------------------------------------------------------------------


def given(weight: Tensor, tensors: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    name = next(n for n in tensors if n not in ("scale", "row_scale"))
    return weight.shape[1], tensors[name]


def boft_weight(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """``diag(s) W R^T`` with PEFT's own permutations, which its CPU code never reaches."""
    (d, entries), b = given(weight, tensors), 4
    layer = BOFTLayer(nn.Linear(d, d))
    rotation, m = eye(d), entries.shape[0]
    for index in range(m):
        order = layer.block_butterfly_perm(d, d // b // 2**index, b // 2, m - 1)
        place = layer.perm2mat(order).double()
        blocks = torch.block_diag(*[cayley(e, b) for e in entries[index]])
        rotation = place @ blocks @ place.T @ rotation  # R_m ... R_1
    return tensors["row_scale"][:, None] * (weight @ rotation.T)


def hra_weight(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    d, vectors = given(weight, tensors)
    for u in vectors:
        weight = weight @ (eye(d) - 2 * torch.outer(u, u) / (u @ u))
    return weight


def oft_weight(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    d, entries = given(weight, tensors)
    return weight @ torch.block_diag(*[cayley(e, 8) for e in entries.expand(d // 8, -1)]).T


def qgoft_weight(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    d, pairs = given(weight, tensors)
    total = eye(d)
    for level in range(1, d.bit_length()):
        for i in range(0, d, 2**level):
            j = i + 2 ** (level - 1)
            plane = eye(d)
            for row, a in enumerate((i, j)):
                for column, b in enumerate((i, j)):
                    plane[a, b] = pairs[j - 1, row, column]
            total = total @ plane
    return weight @ total.T


@pytest.mark.parametrize(("expression", "plain"), [
    ("boft(block=4, factors=3)", boft_weight), ("hra(rank=4)", hra_weight),
    ("oft(block=8, block_share=True)", oft_weight), ("coft(block=8)", oft_weight),
    ("qgoft", qgoft_weight),
])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_weights_are_those_of_the_formula(expression: str, plain: Any, family: str) -> None:
    assert_known_weights(attach(expression, family), plain)


def test_scaled_givens_scale_the_rotated_input() -> None:
    def plain(x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        angles, scale = tensors["givens"], tensors["scale"]
        cos, sin = angles.cos(), angles.sin()
        pairs = torch.stack((cos, -sin, sin, cos), -1).view(-1, 2, 2)
        weight = plain.weight  # pyright: ignore[reportFunctionMemberAccess]
        rotated = qgoft_weight(eye(32), {"pairs": pairs}).T
        return nn.functional.linear((x @ rotated) * scale, weight) + y - x @ weight.T

    made = attach("goft_scaled(site=attention.query, layers=[0])")
    plain.weight = made.model.get_submodule(  # pyright: ignore[reportFunctionMemberAccess]
        made.plan.modules[0].path).weight.detach()
    assert_known_maps(made, plain)


@pytest.mark.parametrize("expression", ALL)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_merged_is_attached(expression: str, family: str) -> None:
    assert_merges(attach(expression, family), family)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_is_pefts(family: str, variant: int) -> None:
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=8,
                             target_modules=TARGETS[family])

    def names(layer: Any, path: str) -> Any:
        return {"pair_rotation.angle": (layer.road_theta["default"], lambda t: t),
                "pair_rotation.scale": (layer.road_alpha["default"], lambda t: t)}

    assert_same_as_peft(family, f"road(group=8, variant={variant})", config, names)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hra_is_pefts(family: str) -> None:
    config = peft.HRAConfig(r=4, target_modules=TARGETS[family], init_weights=True)

    def names(layer: Any, path: str) -> Any:
        return {"reflections": (layer.hra_u["default"], lambda t: t.T)}

    assert_same_as_peft(family, "hra(rank=4)", config, names)


def test_boft_with_one_factor_is_pefts() -> None:
    """Their free entries are whole blocks, of which the skew part counts: half of ours each."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1,
                             target_modules=TARGETS["bert"])

    def blocks(t: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(4, 4, 1)
        full = torch.zeros(*t.shape[:2], 4, 4, dtype=t.dtype)
        full[..., rows, columns] = t
        return full - full.mT

    boft = attach("boft(block=4, factors=1)")
    theirs = peft_model(tiny("bert", "classification", dtype=torch.float64), config).double()
    with torch.no_grad():
        for planned in boft.plan.modules:
            layer: Any = theirs.get_submodule(f"base_model.model.{planned.path}")
            own = {n.rpartition(".")[2]: t for n, t in boft.tensors().items()
                   if n.startswith(f"{planned.path}.")}
            layer.boft_R["default"].copy_(blocks(own["butterfly"]))
            layer.boft_s["default"].copy_(own["row_scale"][:, None])
    assert_known_outputs(boft, logits(theirs, batch()))


# --- procedures ------------------------------------------------------------------------------


def test_penalties_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(7, 2, 2, generator=generator, dtype=torch.float64)
    plain = sum(float(p[:, 0] @ p[:, 1]) ** 2 for p in pairs)
    assert float(penalty(pairs, "columns")) == pytest.approx(plain)
    rows = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    plain = sum((float(rows[i] @ rows[j]) - (i == j)) ** 2 for i in range(4) for j in range(4))
    assert float(penalty(rows, "rows")) == pytest.approx(plain)


@pytest.mark.parametrize(("expression", "of"), [("qgoft", "columns"), ("hra(rank=4)", "rows")])
def test_the_loss_draws_towards_orthogonal(expression: str, of: str, tmp_path: Any) -> None:
    ends = []
    for weight in (0.0, 5.0):
        text = (expression.rstrip(")") + (", " if "(" in expression else "(")
            + f"weight={weight})")
        made = train(text, tmp_path / str(weight), steps=12, learning_rate=0.02)
        ends.append(sum(float(penalty(t.detach(), of)) for t in made.trainable.values()))
    assert ends[1] < 0.7 * ends[0]


def test_constrained_blocks_stay_in_their_ball(tmp_path: Any) -> None:
    made = train("coft(block=8, epsilon=0.01)", tmp_path, steps=5, learning_rate=0.05)
    norms = []
    for entries in made.trainable.values():
        for row in entries.detach().double():
            skew = torch.zeros(8, 8, dtype=torch.float64)
            skew[tuple(torch.triu_indices(8, 8, 1))] = row
            norms.append(float((skew - skew.T).norm()))
    limit = 0.01 / math.sqrt(32 / 8)
    assert max(norms) <= limit * (1 + 1e-6)
    assert max(norms) >= limit * (1 - 1e-6)  # the constraint binds


def test_a_stock_trainer_may_train_what_has_no_penalty(tmp_path: Any) -> None:
    train("hra(rank=4)", tmp_path, steps=1, base=Trainer)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("expression", "message"), [
    ("hra(rank=3)", "even number up to the width 32, not 3"),
    ("hra(rank=34)", "even number up to the width 32, not 34"),
    ("boft(block=5)", "divides and an even block; the width is 32"),
    ("boft(block=4, factors=5)", "need a width that 64 divides"),
    ("road(group=5)", "valid: 2, 4, 8, 16, 32"),
    ("oft(block=5)", "does not divide width 32"),
    ("goft + qgoft(layers=[9])", "layer"),
])
def test_what_does_not_fit_is_refused(expression: str, message: str) -> None:
    with pytest.raises(PeftRefError, match=message):
        peftref.compile(expression, tiny("bert"))


def test_free_pairs_are_no_rotation() -> None:
    """Only orthogonal functions may be called so."""
    spec = peftref.load("qgoft").model_dump(mode="json")
    spec["members"][0]["technique"]["modules"][0]["site"]["port"] = "weight"
    spec["members"][0]["technique"]["modules"][0]["interaction"]["integration"] = "rotate"
    with pytest.raises(CompositionError, match="orthogonal"):
        peftref.compile(spec, tiny("bert"))
