"""Low-rank updates of frozen linears: all forms against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftref.errors import TrainingError
from peftref.ops.lora_linear.op import OPERATOR, lora_linear, lora_linears
from peftref.ops.lora_linear.reference import lora_linear as definition
from peftref.ops.seed import draw_seed
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def arguments(
    targets: int,
    rows: tuple[int, ...] = (3, 5),
    columns: int = 7,
    p: float = 0.0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Random ones; ranks and widths differ from target to target, and so do shapes of scales."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    each = range(targets)
    x = leaf(*rows, columns)
    return (
        x,
        [leaf(4 + i, columns).detach() for i in each],
        [leaf(4 + i) for i in each] if bias else [],
        [leaf(2 + i, columns) for i in each],
        [leaf(4 + i, 2 + i) for i in each],
        [leaf(2 + i) if i % 2 else leaf() for i in each],
        p,
        draw_seed(x) if p else None,
    )


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
)
def test_all_forms_agree(
    targets: int, rows: list[int], columns: int, p: float, bias: bool
) -> None:
    assert_forms_agree(OPERATOR, arguments(targets, tuple(rows), columns, p, bias), 1e-4)


def test_more_blocks_than_one() -> None:
    assert_forms_agree(OPERATOR, arguments(2, (301,), 1021, 0.25), 1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("targets", [1, 2])
def test_gradients(targets: int, p: float) -> None:
    assert_gradients(OPERATOR, arguments(targets, p=p))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_registered(p: float) -> None:
    assert_registered(OPERATOR, arguments(2, p=p))


def test_unused_outputs_and_frozen_arguments() -> None:
    """Only what needs a gradient is computed; an output that nobody reads is a zero gradient."""
    x, weights, biases, downs, ups, scales, p, seed = arguments(2)
    x, biases, scales = x.detach(), [b.detach() for b in biases], [s.detach() for s in scales]
    frozen = (x, weights, biases, [downs[0].detach(), downs[1]], ups, scales, p, seed)
    assert_forms_agree(OPERATOR, frozen, 1e-4)
    wanted = torch.autograd.grad(definition(*frozen)[1].sum(), [downs[1], ups[1]])
    for form in (OPERATOR.direct, OPERATOR.registered.forward):
        found = torch.autograd.grad(form(*frozen)[1].sum(), [downs[1], ups[1]])
        torch.testing.assert_close(found, wanted)


def test_vector_jacobian_of_a_trained_weight() -> None:
    """The op freezes the weight; where it is trained, the plain form runs."""
    x, weights, biases, downs, ups, scales, _, _ = arguments(1)
    weights[0].requires_grad_()
    given_arguments = (x, weights, biases, downs, ups, scales, 0.0, None)
    plain = run(definition, given_arguments)
    torch.testing.assert_close(run(lora_linears, given_arguments), plain)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("frozen", ["", "x", "down", "up", "x bias down"])
def test_the_short_path_of_one_target(p: float, frozen: str) -> None:
    """One target with a constant scale runs through fewer calls, to the same end."""
    x, weights, biases, downs, ups, _, _, _ = arguments(1, (3, 50), 12)
    named = {"x": x, "bias": biases[0], "down": downs[0], "up": ups[0]}
    for name in frozen.split():
        named[name] = named[name].detach()
    x, bias, down, up = named.values()
    scale, seed = torch.tensor(0.7), draw_seed(x) if p else None

    def plain(*given: Any) -> Tensor:
        (y,) = definition(x, weights, [bias], [down], [up], [scale], p, seed)
        return y

    given_arguments = (x, weights[0], bias, down, up, scale, p, seed)
    torch.testing.assert_close(run(lora_linear, given_arguments), run(plain, given_arguments))
    y = lora_linear(*given_arguments)
    y += 1  # some models add to the result of a linear in place
    torch.testing.assert_close(y - 1, plain())


def test_saves_no_mask() -> None:
    """Dropout keeps its seed, two numbers."""
    sizes: list[int] = []
    for p in (0.0, 0.5):
        x, weights, biases, downs, ups, scales, _, _ = arguments(1, (64,), 64)
        held: dict[int, int] = {}

        def pack(t: Tensor, held: dict[int, int] = held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_linears(x, weights, biases, downs, ups, scales, p)
        sizes.append(sum(held.values()))
    assert sizes[1] - sizes[0] == 8


def test_checkpoint_draws_the_same_mask() -> None:
    x, weights, _, downs, ups, scales, _, _ = arguments(1)

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, weights[0], None, downs[0], ups[0], scales[0], 0.5)

    found: list[Tensor] = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        found += torch.autograd.grad(call(x).sum(), [x, downs[0], ups[0]])
    torch.testing.assert_close(found[:3], found[3:])


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_keeps_wide_gradients(compiled: bool) -> None:
    x, weights, biases, downs, ups, scales, _, _ = arguments(1, (8, 16), 64)
    function = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = (function if compiled else lora_linears)(x, weights, biases, downs, ups, scales)
        frozen = torch.nn.functional.linear(x, weights[0], biases[0])
    assert y.dtype == frozen.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), [x, biases[0], downs[0], ups[0]])
    assert {g.dtype for g in gradients} == {torch.float32}
    (exact,) = definition(x, weights, biases, downs, ups, scales, 0.0, None)
    wanted = torch.autograd.grad(exact.sum(), [x, biases[0], downs[0], ups[0]])
    # bfloat16 keeps 8 bits; sums of 128 terms of either sign lose some more.
    for mine, right in zip(gradients, wanted, strict=True):
        assert (mine - right).norm() < 0.03 * right.norm()


def test_bfloat16_backbone_with_float32_adapters() -> None:
    x, weights, biases, downs, ups, scales, p, seed = arguments(1, (40,), 64, p=0.2)
    narrow = (
        x.detach().bfloat16().requires_grad_(), [w.bfloat16() for w in weights],
        [b.detach().bfloat16() for b in biases], downs, ups, scales, p, seed,
    )
    found = run(OPERATOR.direct, narrow)
    biases = [b.detach() for b in biases]
    wanted = run(definition, (x, weights, biases, downs, ups, scales, p, seed))
    assert [f.dtype for f in found[2:]] == [torch.float32] * 3
    for mine, right in zip(found, wanted, strict=True):
        assert (mine - right).norm() < 0.03 * right.norm()


def test_a_second_derivative_is_refused() -> None:
    x, weights, biases, downs, ups, scales, _, _ = arguments(1)
    (y,) = lora_linears(x, weights, biases, downs, ups, scales)
    alone = lora_linear(x, weights[0], None, downs[0], ups[0], torch.tensor(1.0))
    for result in (y, alone):
        (gradient,) = torch.autograd.grad(result.pow(2).sum(), x, create_graph=True)
        with pytest.raises(TrainingError, match=r"lora_linear.*PEFTREF_OPS=reference"):
            gradient.sum().backward()


def test_transforms_of_functions() -> None:
    x, weights, biases, downs, ups, scales, _, _ = arguments(1)

    def loss(down: Tensor, x: Tensor) -> Tensor:
        (y,) = lora_linears(x, weights, biases, [down], ups, scales)
        return y.pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(downs[0], x)
    (whole,) = torch.autograd.grad(loss(downs[0], x), downs[0])
    torch.testing.assert_close(each.sum(0), whole)
