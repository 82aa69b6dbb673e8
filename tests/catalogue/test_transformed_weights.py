"""Updates given by a transform, random bases, a bank of vectors or a chain of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

import peftref
from peftref.errors import PeftRefError
from tests.backbone.tiny import tiny
from tests.catalogue.proof import (
    Tensors,
    WeightForm,
    assert_follows,
    assert_identity,
    assert_known_weights,
    assert_merges,
    assert_reached,
    assert_same_as_peft,
    attach,
    count,
    initial,
)

Names = Callable[[Any], Mapping[str, Any]]
WIDTHS = {"bert": ((32, 32), (32, 32)), "llama": ((32, 32), (32, 16))}
PEFT_SITES = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def same(tensor: Tensor) -> Tensor:
    return tensor


def side(i: int, o: int, rank: int) -> int:
    return round(math.sqrt((i + o) * rank))


def bases(i: int, o: int, rank: int) -> int:
    n = math.ceil(min(i, o) / rank)
    return n * (rank + min(i, o))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "formula", "shared", "exact"), [
    ("mora(rank=4)", lambda i, o: (side(i, o, 4) // 2 * 2) ** 2, 0, True),
    ("mora(rank=4, kind=sum)", lambda i, o: side(i, o, 4) ** 2, 0, True),
    ("fourierft(count=20)", lambda i, o: 20, 0, True),
    ("waveft(count=20)", lambda i, o: 20, 0, True),
    ("c3a(block=8)", lambda i, o: i * o // 8, 0, False),
    ("c3a(block=4, init=zeros)", lambda i, o: i * o // 4, 0, True),
    ("randlora(rank=5)", lambda i, o: bases(i, o, 5), 0, True),
    ("vblora(rank=3, vectors=10, length=8)", lambda i, o: 10 * 3 * (i + o) // 8, 80, False),
    ("said(size=50, site='attention.{query,value}')", lambda i, o: 1, 50, True),
    ("said(size=50, scaled=False, site='attention.{query,value}')", lambda i, o: 0, 50, True),
])
def test_counts_start_and_reach(family: str, expression: str,
                                formula: Callable[[int, int], int], shared: int,
                                exact: bool) -> None:
    expected = shared + 2 * sum(formula(*widths) for widths in WIDTHS[family])
    assert count(expression, family) == expected
    assert_identity(expression, family, exact=exact)
    assert_reached(expression, family)


def mora(rotate: bool) -> WeightForm:
    """The update's columns are what the definition makes of unit vectors."""

    def plain(w: Tensor, t: Tensors) -> Tensor:
        m = t["square"]
        q, (out, width) = len(m), w.shape
        columns: list[Tensor] = []
        for index in range(width):
            x = torch.zeros(width, dtype=w.dtype)
            x[index] = 1.0
            padded = torch.tensor([x[i % width] for i in range(-(-width // q) * q)], dtype=w.dtype)
            groups = padded.view(-1, q)
            if rotate:
                speeds = [10000 ** (-2 * i / q) for i in range(q // 2)]
                turns = [torch.tensor([g * v for v in speeds]) for g in range(len(groups))]
                groups = torch.stack([torch.cat((
                    g[:q // 2] * a.cos() - g[q // 2:] * a.sin(),
                    g[q // 2:] * a.cos() + g[:q // 2] * a.sin()))
                    for g, a in zip(groups, turns, strict=True)])
                y = torch.cat([m @ g for g in groups])
            else:
                y = m @ groups.sum(0)
            columns.append(torch.stack([y[i % len(y)] for i in range(out)]))
        return w + torch.stack(columns, 1)

    return plain


def dense(w: Tensor, entries: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(777)
    places = torch.randperm(w.numel(), generator=generator)[:len(entries)]
    return torch.zeros(w.numel(), dtype=w.dtype).index_put((places,), entries).view_as(w)


def fourier(w: Tensor, t: Tensors) -> Tensor:
    """``sum_pq F_pq cos(2 pi (a p / m + b q / n)) / (m n)``."""
    (m, n), spectrum = w.shape, dense(w, t["spectrum"])
    rows = torch.outer(torch.arange(m), torch.arange(m)).double() * (2 * math.pi / m)
    columns = torch.outer(torch.arange(n), torch.arange(n)).double() * (2 * math.pi / n)
    real = rows.cos() @ spectrum @ columns.cos() - rows.sin() @ spectrum @ columns.sin()
    return w + 3.0 * real / (m * n)


def haar(w: Tensor, t: Tensors) -> Tensor:
    """``H_m F H_n^T``, one-level Haar matrices; differences along rows fill the top right."""

    def basis(size: int) -> Tensor:
        half = torch.eye(size // 2, dtype=w.dtype)
        pairs = [torch.kron(half, torch.tensor([[1.0], [s]], dtype=w.dtype)) for s in (1, -1)]
        return torch.cat(pairs, 1) / math.sqrt(2)

    m, n = w.shape
    top, bottom = dense(w, t["spectrum"]).chunk(2, 0)
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    bands = torch.cat((torch.cat((a, v), 1), torch.cat((h, d), 1)), 0)
    return w + 3.0 * basis(m) @ bands @ basis(n).T


def c3a(w: Tensor, t: Tensors) -> Tensor:
    kernel = t["circulant"]
    b = kernel.shape[-1]
    index = (torch.arange(b)[None] - torch.arange(b)[:, None]) % b
    blocks = [torch.cat([part[index] for part in row], 1) for row in kernel]
    return w + torch.cat(blocks, 0) / w.shape[1]


def randlora(w: Tensor, t: Tensors) -> Tensor:
    small, large = t["random_bases.small"], t["random_bases.large"]
    inner, outer = t["random_bases.lambda"], t["random_bases.gamma"]
    low, high, n = min(w.shape), max(w.shape), inner.shape[1]
    total = sum(large[:high, j] @ torch.diag(inner[:, j]) @ small[:, :low] @ torch.diag(outer[j])
                for j in range(n))
    assert isinstance(total, Tensor)
    return w + 2.0 * (total if total.shape == w.shape else total.T)


def vblora(w: Tensor, t: Tensors) -> Tensor:
    def mixed(logits: Tensor) -> Tensor:
        best, index = logits.topk(2)
        weights = best.exp() / best.exp().sum()
        return weights[0] * t["bank"][index[0]] + weights[1] * t["bank"][index[1]]

    down = torch.stack([torch.cat([mixed(p) for p in row]) for row in t["down.logits"]])
    up = t["up.logits"]
    columns = [torch.cat([mixed(up[p, c]) for p in range(len(up))]) for c in range(up.shape[1])]
    return w + torch.stack(columns, 1) @ down


def said(w: Tensor, t: Tensors) -> Tensor:
    n = t["fastfood.signs"].numel()
    h = torch.from_numpy(linalg.hadamard(n)).double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    z = torch.cat((t["fastfood.intrinsic"], torch.zeros(n - t["fastfood.intrinsic"].numel())))
    normal = t["fastfood.normal"]
    long = h @ (normal * (h @ (t["fastfood.signs"] * z))[order])
    size = (n * normal.square().sum()).sqrt()
    return w + t["fastfood.scale"] * long[:w.numel()].view_as(w) / size


def mpo(w: Tensor, t: Tensors) -> Tensor:
    chain = [t[f"mpo.{name}"] for name in ("first", "second", "core", "fourth", "fifth")]
    whole = torch.einsum("zaAb,bcCd,deEf,fgGh,hiIy->acegiACEGI", *chain)
    return w + whole.reshape(w.shape)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "plain"), [
    ("mora(rank=3, site='{attention.value,ffn.*}')", mora(rotate=True)),
    ("mora(rank=3, kind=sum, site='{attention.value,ffn.*}')", mora(rotate=False)),
    ("fourierft(count=40, scale=3.0, site='{attention.value,ffn.*}')", fourier),
    ("waveft(count=40, scale=3.0, site='{attention.value,ffn.*}')", haar),
    ("c3a(block=8, site='{attention.value,ffn.*}')", c3a),
    ("randlora(rank=5, alpha=10, site='{attention.value,ffn.*}')", randlora),
    ("vblora(rank=3, vectors=10, length=8, site='{attention.value,ffn.*}')", vblora),
    ("said(size=50, site='attention.value')", said),
    ("mpo(bond=4, site='{attention.value,ffn.*}')", mpo),
    ("mpo_sharing(bond=4)", mpo),
])
def test_known_weights(family: str, expression: str, plain: WeightForm) -> None:
    # MoRA's angles are computed in float32, as the widths that they turn need no more.
    tolerance = 1e-5 if "mora" in expression and "sum" not in expression else 1e-10
    assert_known_weights(attach(expression, family), plain, tolerance=tolerance)
    assert_merges(attach(expression, family), family)


def bases_of_peft(m: Any) -> Mapping[str, Any]:
    """PEFT lays the bases of one side out by rank, then number; the other way on the other."""

    def large(t: Tensor) -> Tensor:
        high, n, r = t.shape
        return t.transpose(1, 2).reshape(high, n, r)

    def small(t: Tensor) -> Tensor:
        return t[:, None]

    return {"random_bases.small": (m.randlora_A["default"], small),
            "random_bases.large": (m.randlora_B["default"], large),
            "random_bases.lambda": (m.randlora_lambda["default"], same),
            "random_bases.gamma": (m.randlora_gamma["default"], same)}


def bank_of_peft(m: Any) -> Mapping[str, Any]:
    return {"bank": (m.vblora_vector_bank["default"], same),
            "down.logits": (m.vblora_logits_A["default"], same),
            "up.logits": (m.vblora_logits_B["default"], same)}


@pytest.mark.parametrize(("expression", "config", "names", "tolerance"), [
    # PEFT transforms in float32.
    ("fourierft(count=40, scale=30.0)", lambda to: peft.FourierFTConfig(
        n_frequency=40, scaling=30.0, target_modules=to),
     lambda m: {"spectrum": (m.fourierft_spectrum["default"], same)}, 1e-5),
    ("waveft(count=40, scale=3.0)", lambda to: peft.WaveFTConfig(
        n_frequency=40, scaling=3.0, target_modules=to),
     lambda m: {"spectrum": (m.waveft_spectrum["default"], same)}, 1e-10),
    ("c3a(block=8)", lambda to: peft.C3AConfig(block_size=8, target_modules=to),
     lambda m: {"circulant": (m.c3a_kernel["default"], same)}, 1e-6),
    ("randlora(rank=4, alpha=8)", lambda to: peft.RandLoraConfig(
        r=4, randlora_alpha=8, target_modules=to), bases_of_peft, 1e-10),
    ("vblora(rank=3, vectors=10, length=8)", lambda to: peft.VBLoRAConfig(
        r=3, num_vectors=10, vector_length=8, target_modules=to), bank_of_peft, 1e-10),
])
def test_equal_to_peft(expression: str, config: Callable[[Any], Any], names: Names,
                       tolerance: float) -> None:
    assert_same_as_peft("bert", expression, config(PEFT_SITES["bert"]), lambda m, _: names(m),
                        tolerance=tolerance, same_gradients="c3a" not in expression)


def test_the_input_gradient_of_peft_for_circular_convolution_is_not_that_of_its_output() -> None:
    """Hence only outputs are compared; our gradients are those of the plain definition."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    torch.manual_seed(0)
    kernel = torch.randn(2, 2, 4).double()

    def value(x: Tensor) -> Tensor:
        return BlockCircularConvolution.apply(x, kernel).square().sum()

    x, step = torch.randn(3, 8).double().requires_grad_(), torch.zeros(3, 8).double()
    step[1, 5] = 1e-5
    (stated,) = torch.autograd.grad(value(x), x)
    measured = (value(x + step) - value(x - step)).detach() / 2e-5
    assert abs(float(stated[1, 5] - measured)) > 1e-3


@pytest.mark.parametrize(("expression", "config", "names", "tolerance"), [
    ("waveft(count=40, scale=3.0)", lambda to: peft.WaveFTConfig(
        n_frequency=40, scaling=3.0, target_modules=to),
     lambda m: {"spectrum": (m.waveft_spectrum["default"], same)}, 1e-10),
    ("vblora(rank=3, vectors=10, length=8)", lambda to: peft.VBLoRAConfig(
        r=3, num_vectors=10, vector_length=8, target_modules=to), bank_of_peft, 1e-10),
])
def test_equal_to_peft_with_unequal_widths(expression: str, config: Callable[[Any], Any],
                                           names: Names, tolerance: float) -> None:
    assert_same_as_peft("llama", expression, config(PEFT_SITES["llama"]), lambda m, _: names(m),
                        tolerance=tolerance)


def test_the_middle_of_the_chain_is_one_for_all_layers() -> None:
    alone, together = count("mpo(bond=4)"), count("mpo_sharing(bond=4)")
    adapted = attach("mpo_sharing(bond=4)")
    cores = {n: t.numel() for n, t in adapted.trainable.items() if n.endswith("core")}
    assert len(cores) == 2  # query and value
    assert alone - together == sum(cores.values())
    assert_identity("mpo_sharing(bond=4)")
    assert_reached("mpo_sharing(bond=4)")
    # The factors multiply to the widths, and the middle one is the largest.
    from peftref.primitives.mpo import _factors

    for width in (32, 48, 768, 3072, 97, 1):
        factors = _factors(width)
        assert math.prod(factors) == width
        assert max(factors) == factors[2]
    assert sorted(_factors(768)) == [3, 4, 4, 4, 4]


def test_first_values() -> None:
    bound = math.sqrt(6 / 64)
    assert_follows(initial("c3a(block=4)", "circulant"), stats.uniform(-bound, 2 * bound))
    vb = "vblora(rank=4, vectors=30, length=16)"
    assert_follows(initial(vb, "bank"), stats.uniform(-0.02, 0.04))
    assert_follows(initial(vb, "logits"), stats.norm(0, 0.1))
    root = math.sqrt(3)
    assert_follows(initial("randlora(rank=8)", "small"), stats.uniform(-root, 2 * root))
    assert (initial("randlora(rank=8)", "gamma") == torch.tensor(1 / 32).double()).all()
    assert set(initial("said(size=9)", "signs").tolist()) == {-1.0, 1.0}
    assert_follows(initial("said(size=9, site=attention.query)", "normal"), stats.norm(0, 1))


def test_each_site_has_its_own_projection() -> None:
    adapted = attach("said(size=50, site=attention.query)", moved=True)
    adapted.merge()
    bare = tiny("bert", "classification", dtype=torch.float64)
    changes = [a.attention.self.query.weight - b.attention.self.query.weight for a, b in zip(
        adapted.model.bert.encoder.layer, bare.bert.encoder.layer, strict=True)]
    first, second = (change.detach().flatten() for change in changes)
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, 0))) < 0.3


@pytest.mark.parametrize(("expression", "words"), [
    ("mora(rank=64)", "square of side 64, above the 32 entries"),
    ("fourierft(count=2000)", "2000 entries of a matrix that has 1024"),
    ("c3a(block=5)", "block 5 does not divide width 32"),
    ("randlora(rank=64)", "rank 64 is above the smaller width 32"),
    ("vblora(length=5)", "length 5 do not divide width 32"),
    ("vblora(vectors=3, length=8, topk=4)", "topk 4 of 3 vectors"),
    ("said(size=5000)", "5000 numbers for a matrix of 1024"),
])
def test_what_does_not_fit_is_refused(expression: str, words: str) -> None:
    with pytest.raises(PeftRefError, match=words):
        peftref.compile(expression, tiny("bert", "classification"))
