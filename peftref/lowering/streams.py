"""Layers that run on two streams and can be inverted.

    y1 = a x1 + F(x2),  y2 = b x2 + G(y1);   x2 = (y2 - G(y1)) / b,  x1 = (y1 - F(x2)) / a

Both streams travel as one tensor, side by side in the last dimension, so that the model's own loop
over its layers stays as it is: the first layer doubles its input, the last one gives the mean.
MEFT, Liao, Tan and Monz 2023, https://arxiv.org/abs/2306.00477
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.ir.types import Streams
from peftref.lowering.invert import Parts, Tape, invertible, joined
from peftref.lowering.program import BoundEdit
from peftref.lowering.state import CHILD, AdapterState, Seam

__all__ = ["HalvesOfLayer", "WholeLayer", "run_streams"]

Layer = Callable[[Tensor], Tensor]
Mark = Callable[[], None]


def run_streams(
    module: nn.Module,
    state: AdapterState,
    edits: list[BoundEdit],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401 - whatever the layer returns
    """Run a layer on two streams; ``call`` is the layer with all that is edited inside of it."""
    streams = _streams(edits)
    if args:
        x, args = args[0], args[1:]
    else:
        kwargs = dict(kwargs)
        x = kwargs.pop(state.argument)
    x = torch.cat((x, x), -1) if streams.opens else x
    rest: list[Any] = []

    def layer(stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result = call(stream, *args, **kwargs)
        rest[:] = [result]
        return result[0] if isinstance(result, tuple) else result

    trained = _trained(module, state)
    if not torch.is_grad_enabled() or not (x.requires_grad or trained) or _is_plain(
        module, (*args, *kwargs.values())
    ):
        whole = make_parts(state, edits, lambda s: layer(s, args, kwargs))
        x1, x2 = x.chunk(2, -1)
        y = joined(streams, *whole.both(x1, x2))
    else:
        # An empty cache would be filled once more by the recomputation.
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        tapes = state.context.tapes
        if streams.opens:
            tapes[streams.stack] = Tape()

        def parts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
            return make_parts(state, edits, lambda s: layer(s, args, kwargs))

        y = invertible(streams, state.context, tapes[streams.stack], parts, x,
                       (args, kwargs), trained)
        if streams.closes:
            del tapes[streams.stack]
    if streams.closes:
        y = sum(y.chunk(2, -1)) / 2
    result = rest[0]
    return (y, *result[1:]) if isinstance(result, tuple) else y


class WholeLayer:
    """The frozen layer is one of the two functions, what the members add is the other."""

    def __init__(self, streams: Streams, layer: Layer, edits: list[BoundEdit]) -> None:
        self._streams, self._layer, self._edits = streams, layer, edits

    def first(self, x: Tensor) -> Tensor:
        """``F(x2)``."""
        return self._layer(x) if self._streams.layer == "first" else self._added(x)

    def second(self, y: Tensor, restore: Mark = lambda: None) -> Tensor:
        """``G(y1)``; ``restore`` is called before anything is drawn in it."""
        restore()
        return self._layer(y) if self._streams.layer == "second" else self._added(y)

    def both(self, x1: Tensor, x2: Tensor, mark: Mark = lambda: None) -> tuple[Tensor, Tensor]:
        """``y1, y2``; ``mark`` is called between the two functions."""
        y1 = self._streams.scales[0] * x1 + self.first(x2)
        return y1, self._streams.scales[1] * x2 + self.second(y1, mark)

    def _added(self, x: Tensor) -> Tensor:
        """What all members would add to a stream that is ``x``."""
        values = [edit.gate(x) * edit.stream(x) if edit.gated else edit.stream(x)
                  for edit in self._edits]
        return sum(values[1:], start=values[0])


class HalvesOfLayer:
    """Attention with its sum and norm is the first function, the rest of the layer the second.

    The seam is the norm behind attention: it tells what the first half gave, and can give
    something else to the second.
    """

    def __init__(self, streams: Streams, layer: Layer, seam: Seam) -> None:
        self._streams, self._layer, self._seam = streams, layer, seam

    def first(self, x: Tensor) -> Tensor:
        """``F(x2)``: the layer runs up to its seam."""
        try:
            self._run(x, _stop)
        except _Reached as reached:
            return reached.value
        raise BackboneError("a reversible layer ran without its attention norm")

    def second(self, y: Tensor, restore: Mark = lambda: None) -> Tensor:
        """``G(y1)``: what attention gives is put aside, and the seam hands on ``y1``."""

        def instead(_: Tensor) -> Tensor:
            restore()
            return y

        return self._run(y.detach(), instead)

    def both(self, x1: Tensor, x2: Tensor, mark: Mark = lambda: None) -> tuple[Tensor, Tensor]:
        """``y1, y2`` in one run of the layer."""
        found: list[Tensor] = []

        def onto(h: Tensor) -> Tensor:
            mark()
            found.append(self._streams.scales[0] * x1 + h)
            return found[0]

        out = self._run(x2, onto)
        return found[0], self._streams.scales[1] * x2 + out

    def _run(self, x: Tensor, at_seam: Layer) -> Tensor:
        self._seam.function = at_seam
        try:
            return self._layer(x)
        finally:
            self._seam.function = None


class _Reached(Exception):  # noqa: N818 - a way out, no error
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _stop(h: Tensor) -> Tensor:
    raise _Reached(h)


def make_parts(state: AdapterState, edits: list[BoundEdit], layer: Layer) -> Parts:
    """The two functions of a layer."""
    streams = _streams(edits)
    if streams.layer != "halves":
        return WholeLayer(streams, layer, edits)
    if state.seam is None:
        raise TypeError("a reversible layer has no seam")
    return HalvesOfLayer(streams, layer, state.seam)


def _streams(edits: list[BoundEdit]) -> Streams:
    found = {edit.edit.write.streams for edit in edits}
    (streams, *others) = found
    if streams is None or others:
        raise BackboneError(
            f"{edits[0].edit.write.label}: two adapters make this layer reversible in different "
            "ways; keep one of them active"
        )
    return streams


def _trained(module: nn.Module, state: AdapterState) -> list[nn.Parameter]:
    """What may get a gradient from this layer: its own tensors, and those that layers share."""
    root = state.__dict__["root"]
    own = list(module.parameters())
    shared = [] if root is None else list(root.parameters())
    return [p for p in dict.fromkeys((*own, *shared)) if p.requires_grad]


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")


def _is_plain(module: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Whether activations are to be kept after all.

    A compiler recomputes by its own rules, a cache holds what came before, and what a hook sees
    inside must belong to the graph.
    """
    if torch.compiler.is_compiling():
        return True
    if any(_is_cache(value) and value.get_seq_length() for value in arguments):
        return True
    return any(
        part._forward_hooks or part._forward_pre_hooks
        for name, part in module.named_modules() if name.rpartition(".")[2] != CHILD
    )
