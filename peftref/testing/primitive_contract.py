"""What every primitive must keep; a new one subclasses ``PrimitiveContract`` in its tests.

    class TestMine(PrimitiveContract):
        cases = (Case("mine", {"rank": 2}), Case("mine", {"rank": 3}, d_in=4))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from peftref.ir.primitive import Place, Primitive, TensorSpec
from peftref.lowering.initialise import initial_tensor
from peftref.registry import primitives

__all__ = ["Case", "PrimitiveContract"]

EXACT = 1e-12  # float64; forms differ in the order of their sums
ROUNDED = 1e-6  # first values are drawn in float32


@dataclass(frozen=True)
class Case:
    """One primitive at one place.

    Attributes:
        name: as registered.
        arguments: from YAML.
        d_in: width that reaches it; ``d_out``: of the port; ``hidden``: of the residual stream.
        port_shape: of the port's own tensor; None: (d_out, d_in).
        streams: how many streams a combinator joins.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])
    d_in: int = 12
    d_out: int = 8
    hidden: int = 16
    port_shape: tuple[int, ...] | None = None
    streams: int = 1

    def make(self) -> Primitive:
        """Return the primitive."""
        shape = (self.d_out, self.d_in) if self.port_shape is None else self.port_shape
        kind = primitives.get(self.name)
        place = Place(self.d_in, self.d_out, self.hidden, shape, "encoder", heads=2, layers=2)
        return kind(kind.Arguments(**self.arguments), place)

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.name}({given})"


@dataclass
class _Still:
    """The runtime of a module in evaluation mode, without padding."""

    case: Case
    training: bool = False

    def token_mask(self, stack: str) -> Tensor | None:
        return None

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (rows @ weight(self.case).mT).chunk(2, -1)
        return keys, values

    def weight(self) -> Tensor:
        return weight(self.case)


class PrimitiveContract:
    """The declared algebra is true of the torch forms, and the two forms agree.

    Subclasses give ``cases``; all that a primitive declares is checked numerically in float64.
    """

    cases: ClassVar[tuple[Case, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test for every case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    # --- forms -----------------------------------------------------------------------------

    @staticmethod
    def tensors(case: Case, *, start: bool) -> list[Tensor]:
        """First values, or (``start`` False) values away from them."""
        generator = torch.Generator().manual_seed(7)
        found: list[Tensor] = []
        for spec in case.make().tensors():
            first = initial_tensor(spec, spec.name, 0, lambda: weight(case))
            if not first.is_floating_point():
                found.append(first)  # indices do not move
                continue
            first = first.double()
            noise = torch.randn(first.shape, generator=generator, dtype=torch.float64)
            found.append(first if start else first + 0.3 * noise)
        return found

    @staticmethod
    def stream(case: Case, seed: int = 0) -> Tensor:
        """A batch of two sequences of three tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, 3, case.d_in, generator=generator, dtype=torch.float64)

    def apply(self, case: Case, *, start: bool) -> Callable[[Tensor], Tensor]:
        """The activation form as a function of the stream."""
        primitive, tensors = case.make(), self.tensors(case, start=start)
        form = primitive.bind(_Still(case))
        if primitive.algebra().source:
            return lambda _: form(*tensors)
        return lambda x: form(*[x] * case.streams, *tensors)

    # --- what is checked -------------------------------------------------------------------

    def test_tensors_have_unique_names_and_whole_shapes(self, case: Case) -> None:
        """Names are unique; shapes are positive; first values have that shape and are finite."""
        specs: tuple[TensorSpec, ...] = case.make().tensors()
        assert len({spec.name for spec in specs}) == len(specs)
        for spec, tensor in zip(specs, self.tensors(case, start=True), strict=True):
            assert all(extent > 0 for extent in spec.shape)
            assert tuple(tensor.shape) == spec.shape
            assert bool(torch.isfinite(tensor).all())

    def test_the_width_is_as_stated(self, case: Case) -> None:
        """The last dimension of the result is ``width``."""
        primitive = case.make()
        if primitive.algebra().stream and not primitive.on_tensors:
            result = self.apply(case, start=False)(self.stream(case))
            whole = primitive.algebra().source and result.shape == primitive.place.port_shape
            assert whole or result.shape[-1] == primitive.width

    def test_the_matrix_form_equals_the_activation_form(self, case: Case) -> None:
        """``f(x) = M x`` with ``M`` from the identity, and ``M W`` from a matrix ``W``."""
        primitive = case.make()
        algebra = primitive.algebra()
        if not (algebra.matrix and algebra.linear and algebra.stream) or case.streams > 1:
            pytest.skip("has only one of the forms")
        form = primitive.bind_matrix(_Still(case))
        tensors = self.tensors(case, start=False)
        eye = torch.eye(case.d_in, dtype=torch.float64)
        matrix = form(eye, *tensors)
        x = self.stream(case)
        result = self.apply(case, start=False)(x)
        torch.testing.assert_close(x @ matrix.mT, result, rtol=0, atol=EXACT)
        if tensors:
            torch.testing.assert_close(form(None, *tensors), matrix, rtol=0, atol=EXACT)
        before = torch.randn(case.d_in, 5, dtype=torch.float64)
        torch.testing.assert_close(form(before, *tensors), matrix @ before, rtol=0, atol=EXACT)

    def test_the_declared_algebra_is_true(self, case: Case) -> None:
        """Linear, diagonal, orthogonal and source, away from the first values."""
        algebra = case.make().algebra()
        if not algebra.stream:
            pytest.skip("has no activation form")
        f, x, y = self.apply(case, start=False), self.stream(case), self.stream(case, 1)
        linear = (f(2 * x - 3 * y) - 2 * f(x) + 3 * f(y)).abs().max() <= EXACT * 100
        assert not algebra.linear or linear
        if algebra.diagonal:
            ones = f(torch.ones_like(x))
            torch.testing.assert_close(f(x), ones * x, rtol=0, atol=EXACT)
        if algebra.orthogonal:
            matrix = f(torch.eye(case.d_in, dtype=torch.float64))
            torch.testing.assert_close(matrix @ matrix.mT, torch.eye(case.d_in).double(),
                                       rtol=0, atol=1e-10)
            assert float(torch.linalg.det(matrix)) == pytest.approx(1.0)
        if algebra.source:
            assert torch.equal(f(x), f(y))

    def test_what_holds_at_the_start_is_true(self, case: Case) -> None:
        """Zero, identity and f(0) = 0 before the first step."""
        algebra = case.make().algebra()
        if not algebra.stream:
            pytest.skip("has no activation form")
        f, x = self.apply(case, start=True), self.stream(case)
        if algebra.zero_at_init:
            assert not bool(f(x).any())
        if algebra.identity_at_init:
            torch.testing.assert_close(f(x), x, rtol=0, atol=ROUNDED)
        if algebra.keeps_zero:
            assert not bool(f(torch.zeros_like(x)).any())

    def test_every_trained_tensor_has_a_gradient(self, case: Case) -> None:
        """Away from the first values, each tensor changes the result."""
        primitive = case.make()
        tensors = self.tensors(case, start=False)
        trained = [t.requires_grad_() for t, spec in zip(tensors, primitive.tensors(), strict=True)
                   if spec.trainable]
        form = primitive.bind(_Still(case))
        if not trained:
            pytest.skip("trains nothing")
        first = [] if primitive.algebra().source else [self.stream(case)] * case.streams
        if not primitive.algebra().stream:
            eye = torch.eye(case.d_in, dtype=torch.float64)
            first = [eye if primitive.algebra().linear else weight(case)]
            form = primitive.bind_matrix(_Still(case))
        result = form(*first, *tensors)
        weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
        gradients = torch.autograd.grad((weights * result).sum(), trained)
        assert all(bool(gradient.any()) for gradient in gradients)

    @staticmethod
    def tokens(case: Case, x: Tensor) -> int:
        """How many tokens a stream has."""
        return x.numel() // case.d_in

    def test_flops_are_at_least_those_that_torch_counts(self, case: Case) -> None:
        """Products of matrices are counted by torch; elementwise work may come on top."""
        from torch.utils.flop_counter import FlopCounterMode

        primitive = case.make()
        if not primitive.algebra().stream or primitive.algebra().source:
            pytest.skip("is not run once a token")
        x = self.stream(case)
        with FlopCounterMode(display=False) as counter:
            self.apply(case, start=False)(x)
        tokens = self.tokens(case, x)
        counted = counter.get_total_flops() / tokens
        if counted:
            assert counted <= primitive.flops() * 1.5 + 1
            assert primitive.flops() <= counted
        else:
            assert primitive.flops() <= 16 * max(case.d_in, case.d_out)


def weight(case: Case) -> Tensor:
    """A backbone weight at the case's site."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(case.d_out, case.d_in, generator=generator, dtype=torch.float64)
