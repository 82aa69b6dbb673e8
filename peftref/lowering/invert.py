"""Backward passes of layers whose inputs are computed back from their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from peftref.errors import BackboneError
from peftref.ir.activations import inversions
from peftref.ir.types import Streams

if TYPE_CHECKING:
    from peftref.lowering.state import CallContext

__all__ = ["Parts", "Tape", "invertible", "joined"]

class Parts(Protocol):
    """The two functions of a layer."""

    def first(self, x: Tensor) -> Tensor:
        """``F(x2)``."""
        ...

    def second(self, y: Tensor, restore: Callable[[], None] = ...) -> Tensor:
        """``G(y1)``; ``restore`` is called before anything is drawn in it."""
        ...

    def both(
        self, x1: Tensor, x2: Tensor, mark: Callable[[], None] = ...
    ) -> tuple[Tensor, Tensor]:
        """``y1, y2``; ``mark`` is called between the two functions."""
        ...


def joined(streams: Streams, y1: Tensor, y2: Tensor) -> Tensor:
    """Both streams side by side, as the next layer takes them."""
    return torch.cat((y2, y1) if streams.swaps else (y1, y2), -1)


@dataclass
class Tape:
    """Between the backward passes of two layers: the output of the lower one.

    One for the layers of a stack in one call, so that the passes of two calls do not meet.
    """

    value: Tensor | None = None

    def take(self) -> Tensor:
        """Give the tensor away: nothing is held longer than needed."""
        value, self.value = self.value, None
        if value is None:
            raise BackboneError(
                "the gradient of a reversible layer is asked for without that of the layer above; "
                "use the output of the whole model"
            )
        return value


@dataclass
class _Run:
    """All that a layer's backward pass must know of its forward pass; no activation."""

    streams: Streams
    context: CallContext
    tape: Tape
    parts: Callable[[tuple[Any, ...], dict[str, Any]], Parts]
    leaves: list[Any]
    structure: Any
    outer: list[int]
    draws: _Draws
    keeps: bool

    def rebuilt(self, outer: list[Tensor]) -> Parts:
        """The two functions, with ``outer`` for the arguments that need a gradient."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.outer, outer, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.parts(args, kwargs)


def invertible(
    streams: Streams,
    context: CallContext,
    tape: Tape,
    parts: Callable[[tuple[Any, ...], dict[str, Any]], Parts],
    x: Tensor,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    trained: list[torch.nn.Parameter],
) -> Tensor:
    """``parts(...).both(x1, x2)``, packed; keeps its input or nothing for the backward pass.

    Args:
        streams: how the layer is made reversible.
        context: of the running call: its padding masks are those of the recomputation too.
        tape: of this stack in this call.
        parts: the two functions, for arguments of the layer.
        x: both streams, (..., 2 d).
        arguments: what the layer is called with beside the stream.
        trained: tensors that the functions use and that need a gradient.
    """
    leaves, structure = tree_flatten(arguments)
    outer = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.requires_grad]
    given = [leaves[i] for i in outer]
    leaves = [None if i in outer else leaf for i, leaf in enumerate(leaves)]
    draws = _Draws(x, context.masks)
    most = inversions(streams, torch.finfo(draws.dtype).eps)
    keeps = most < streams.count and streams.index % (most + 1) == 0
    run = _Run(streams, context, tape, parts, leaves, structure, outer, draws, keeps)
    return _Invertible.apply(run, len(given), x, *given, *trained)  # pyright: ignore[reportReturnType]


class _Invertible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, outer: int, x: Tensor, *tensors: Tensor) -> Tensor:  # noqa: ANN401
        ctx.run, ctx.outer = run, outer
        run.draws.note()
        x1, x2 = x.chunk(2, -1)
        parts = run.rebuilt(list(tensors[:outer]))
        y = joined(run.streams, *parts.both(x1, x2, run.draws.note))
        top = run.streams.closes and not run.keeps
        kept = [x] if run.keeps else [y] if top else []
        ctx.save_for_backward(*kept, *tensors)
        ctx.kept = bool(kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor  # noqa: ANN401
    ) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        saved = list(ctx.saved_tensors)
        held = saved.pop(0) if ctx.kept else None
        if run.keeps:
            run.tape.value = None  # what the layer above found is less exact than what is kept
        held = run.tape.take() if held is None else held
        outer = [t.detach().requires_grad_() for t in saved[: ctx.outer]]
        trained = saved[ctx.outer :]
        with run.context.within(run.draws.masks):
            x, dx, others = _back(run, held, gradients[0], [*outer, *trained], ctx.outer)
        run.tape.value = None if run.streams.opens else x
        return (None, None, dx, *others)


def _back(
    run: _Run, held: Tensor, dy: Tensor, sources: list[Tensor], outer: int
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The input of a layer, its gradient and those of ``sources``."""
    first, second = run.streams.scales
    parts, draws = run.rebuilt(sources[:outer]), run.draws
    f = read = None
    y1, y2 = _order(run, held.detach())
    if run.keeps:
        x1, x2 = held.detach().chunk(2, -1)
        read = x2.requires_grad_()
        with draws.again(0):
            f = parts.first(read)
        y1 = first * x1 + f.detach()
    dy1, dy2 = _order(run, dy)
    y1 = y1.detach().requires_grad_()
    with draws.again():
        g = parts.second(y1, lambda: draws.set(1))
    more, totals = _gradients(g, y1, sources, dy2)
    dy1 = dy1 + more
    if f is None or read is None:
        read = ((y2 - g.detach()) / second).requires_grad_()
        del g
        with draws.again(0):
            f = parts.first(read)
    more, others = _gradients(f, read, sources, dy1)
    dx2 = second * dy2 + more
    totals = [_plus(a, b) for a, b in zip(totals, others, strict=True)]
    x1 = (y1.detach() - f.detach()) / first
    x = held if run.keeps else torch.cat((x1, read.detach()), -1)
    return x, torch.cat((first * dy1, dx2), -1), totals


def _gradients(
    of: Tensor, read: Tensor, sources: list[Tensor], dy: Tensor
) -> tuple[Tensor | float, list[Tensor | None]]:
    """The gradient of what a function reads, 0 where there is none, and those of ``sources``."""
    found: list[Tensor | None] = list(
        torch.autograd.grad(of, [read, *sources], dy, allow_unused=True))
    return (0.0 if found[0] is None else found[0]), found[1:]


def _order(run: _Run, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the first and of the second stream."""
    one, two = packed.chunk(2, -1)
    return (two, one) if run.streams.swaps else (one, two)


def _plus(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two


class _Draws:
    """What the call had: random generators before each function, autocast, padding masks."""

    def __init__(self, x: Tensor, masks: dict[str, Tensor] | None) -> None:
        self.masks = masks
        self._device = x.device
        kind = x.device.type
        self._cast = torch.is_autocast_enabled(kind)
        self._to = torch.get_autocast_dtype(kind)
        self._states: list[tuple[Tensor, Tensor | None]] = []
        self.dtype = self._to if self._cast else x.dtype

    def note(self) -> None:
        """Keep the state that the next function begins with."""
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._states.append((torch.get_rng_state(), cuda))

    def set(self, index: int) -> None:
        """Let the generators go on from a state that was kept."""
        cpu, cuda = self._states[index]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)

    @contextmanager
    def again(self, index: int | None = None) -> Iterator[None]:
        """Compute once more, with a graph, what the forward pass computed."""
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autocast(self._device.type, self._to, enabled=self._cast),
        ):
            if index is not None:
                self.set(index)
            yield
