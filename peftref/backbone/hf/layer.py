"""What the linears and norms of one layer are, by what they do in a trial.

The trial is one forward of a small random model with every argument and result noted, so that two
tensors are equal only if one *is* the other; and the row probe. With residual stream r, a
sub-layer f and its norm n, a layer is understood when ``r + f(n(r))`` (pre-norm), ``n(r + f(r))``
(post-norm) or ``r + f1 + f2`` (side by side) are exactly the tensors seen, up to its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftref.backbone.hf.modules import measure, named_modules
from peftref.backbone.hf.probe import PARTS, Part, Probe
from peftref.backbone.hf.trace import Attended, Call
from peftref.backbone.infer import Finding
from peftref.backbone.rows import row_slice
from peftref.backbone.site_table import SiteKind

__all__ = ["Doubt", "LayerReader", "kind_of", "same"]

FUSED = ("thirds", "head_interleaved", "gqa", "multi_query", "grouped")
TOLERANCE = 1e-4  # float32 sums in another order; unrelated random tensors differ by about 1


class Doubt(Exception):  # noqa: N818 - no error: it ends in a refusal that lists it
    """Something about a layer that no rule explains."""


def kind_of(module: nn.Module) -> SiteKind:
    """Return what a module is; a norm with a weight for each head (Cohere) is one too."""
    kind = measure(module).kind
    named = "Norm" in type(module).__name__ and kind is not SiteKind.LINEAR
    weight = getattr(module, "weight", None)
    return SiteKind.NORM if named and isinstance(weight, nn.Parameter) else kind


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two noted tensors hold the same values, in whatever shape."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    if not one.is_floating_point() or not other.is_floating_point():
        return bool(torch.equal(one.reshape(-1), other.reshape(-1)))
    scale = float(one.abs().max()) + 1e-12
    return float((one.reshape(-1) - other.reshape(-1)).abs().max()) <= TOLERANCE * scale


@dataclass(slots=True)
class _SubLayer:
    """A sub-layer: what it reads, what it adds to the stream, and where it starts."""

    name: str
    reads: Tensor
    adds: Tensor


@dataclass(slots=True)
class LayerReader:
    """Finds the roles of one layer.

    Args:
        probe: the small model, traced.
        path: of the layer.
        hidden: width of the residual stream.
    """

    probe: Probe
    path: str
    hidden: int
    placed: dict[str, str] = field(default_factory=dict[str, str])  # module -> role
    findings: list[Finding] = field(default_factory=list[Finding])
    norms: set[str] = field(default_factory=set[str])

    def read(self) -> tuple[Finding, ...]:
        """Return a finding for every role.

        Raises:
            Doubt: not everything in the layer is explained.
        """
        parts: list[_SubLayer] = []
        attended = self._attended()
        for name, where in zip(("attention", "cross_attention"), attended, strict=False):
            parts.append(self._attention(name, where))
        parts.append(self._feed_forward(parts))
        self._stream(parts)
        left = sorted(path for path, module in named_modules(self.probe.model).items()
                      if path.startswith(f"{self.path}.") and path not in self.placed
                      and kind_of(module) is not SiteKind.EMBEDDING
                      and any(True for _ in module.parameters(recurse=False)))
        if left or any(True for _ in self._layer().parameters(recurse=False)):
            raise Doubt(f"{', '.join(left) or self.path}: no role explains what its weights do")
        # As a built-in row: in the order in which the modules have finished.
        self.findings.sort(key=lambda each: self._call(f"{self.path}.{each.module}").end)
        return tuple(self.findings)

    # --- the trace ---------------------------------------------------------------------------

    def _attended(self) -> list[int]:
        """Return the numbers of this layer's attentions in the trace: itself, then across."""
        found = [i for i, each in enumerate(self.probe.trace.attended)
                 if each.path == self.path or each.path.startswith(f"{self.path}.")]
        across = [i for i in found if self._at(i).query.shape[2] != self._at(i).key.shape[2]]
        alone = [i for i in found if i not in across]
        if len(alone) != 1 or len(across) > 1:
            raise Doubt(f"{self.path}: attends {len(alone)} times to its own tokens and "
                        f"{len(across)} times to others")
        return alone + across

    def _at(self, index: int) -> Attended:
        return self.probe.trace.attended[index]

    def _layer(self) -> nn.Module:
        return self.probe.model.get_submodule(self.path)

    def _call(self, path: str) -> Call:
        calls = self.probe.trace.calls.get(path, [])
        if len(calls) != 1:
            raise Doubt(f"{path}: is called {len(calls)} times in one forward")
        return calls[0]

    def _calls(self, *kinds: SiteKind) -> list[Call]:
        """Return the calls of the layer's modules of these kinds, in order."""
        inside = [path for path in self.probe.trace.calls if path.startswith(f"{self.path}.")
                  and kind_of(self.probe.model.get_submodule(path)) in kinds]
        return sorted((self._call(path) for path in inside), key=lambda call: call.begin)

    def _place(self, role: str, module: str, why: str, **settings: object) -> None:
        if module in self.placed:
            raise Doubt(f"{module}: would be {self.placed[module]} and {role}")
        self.placed[module] = role
        kept = {name: value for name, value in settings.items() if value is not None}
        self.findings.append(Finding(role, self._inside(module), why, kept))

    def _inside(self, module: str) -> str:
        return module.removeprefix(f"{self.path}.")

    # --- attention ---------------------------------------------------------------------------

    def _attention(self, name: str, index: int) -> _SubLayer:
        attended = self._at(index)
        sources = self._sources(name, index)
        for part in PARTS:
            if len(sources[part]) != 1:
                listed = ", ".join(sources[part]) or "no linear"
                raise Doubt(f"{name}.{part} of {self.path}: {listed} can be it")
        paths = dict.fromkeys(sources[part][0] for part in PARTS)
        for path in paths:
            own: list[Part] = [part for part in PARTS if sources[part] == [path]]
            if len(own) == 1:
                self._place(f"{name}.{own[0]}", path, f"its rows change the {own[0]} and no more")
            else:
                self._fused(name, index, path, own)
        self._query_key_norms(name, index)
        after = [c for c in self._calls(SiteKind.LINEAR) if c.begin > attended.when]
        ends = [c for c in after if same(_argument(c), attended.result)]
        if len(ends) != 1:
            raise Doubt(f"{name}.output of {self.path}: {len(ends)} linears read what was attended")
        self._place(f"{name}.output", ends[0].path, "reads what was attended")
        reads = _argument(self._call(sources["query"][0]))
        self._span(name, ends[0], reads, attended.path)
        return _SubLayer(name, reads, _result(ends[0]))

    def _sources(self, name: str, index: int) -> dict[Part, list[str]]:
        found: dict[Part, list[str]] = {part: [] for part in PARTS}
        for call in self._calls(SiteKind.LINEAR):
            if call.path in self.placed or call.begin > self._at(index).when:
                continue
            effects = self.probe.effects(call.path)
            if not effects:
                raise Doubt(f"{call.path}: its weight changes how often the layer attends")
            effect = effects[index]
            if effect.reached != effect.whole:
                raise Doubt(f"{call.path}: changes a part of {name}'s heads only")
            for part in effect.reached:
                found[part].append(call.path)
        return found

    def _fused(self, name: str, index: int, path: str, own: Sequence[Part]) -> None:
        attended = self._at(index)
        total = measure(self.probe.model.get_submodule(path)).d_out
        heads, groups, width = (attended.query.shape[1], attended.key.shape[1],
                                attended.query.shape[3])
        rules = ("halves",) if len(own) == 2 else FUSED
        for rule in rules:
            slices = [row_slice(rule, i, total, heads, groups, width) for i in range(len(own))]
            if all(rows is not None and self.probe.effects(path, rows)[index].whole == (part,)
                   and self.probe.effects(path, rows)[index].reached == (part,)
                   for rows, part in zip(slices, own, strict=True)):
                self._place(f"{name}.{{{','.join(own)}}}", path,
                            "each slice of rows changes its part and no more", rows=rule)
                return
        raise Doubt(f"{path}: makes {', '.join(own)} in a layout that no rule describes "
                    f"({total} rows, {heads} heads, {groups} key-value heads of {width})")

    def _query_key_norms(self, name: str, index: int) -> None:
        """Place the norms inside attention: what they give reaches one part alone."""
        starts = [self._call(path).begin for path, role in self.placed.items()
                  if role.startswith(f"{name}.") and not role.endswith("output")]
        for call in self._calls(SiteKind.NORM):
            if min(starts) < call.begin < self._at(index).when:
                reached = self.probe.effects(call.path)[index].reached
                if name != "attention" or reached not in (("query",), ("key",)):
                    raise Doubt(f"{call.path}: a norm inside {name} that changes "
                                f"{', '.join(reached) or 'nothing'}")
                self._place(f"norm.{reached[0]}", call.path,
                            f"changes the {reached[0]} and no more")

    # --- feed-forward ------------------------------------------------------------------------

    def _feed_forward(self, before: Sequence[_SubLayer]) -> _SubLayer:
        calls = [c for c in self._calls(SiteKind.LINEAR) if c.path not in self.placed]
        if not calls:
            raise Doubt(f"{self.path}: no linear is left for a feed-forward part")
        down, first = max(calls, key=lambda call: call.begin), calls[:-1]
        if not 1 <= len(first) <= 2:
            listed = ", ".join(call.path for call in calls)
            raise Doubt(f"{self.path}: {len(calls)} linears ({listed}) are left for a "
                        "feed-forward part, which has two or three")
        reads = _argument(first[0])
        if not all(same(_argument(call), reads) for call in first):
            raise Doubt(f"{self.path}: {' and '.join(c.path for c in first)} read different inputs")
        if _result(first[0]).shape[-1] != _argument(down).shape[-1]:
            self._fused_gate(first, down)
        elif len(first) == 1:
            self._place("ffn.up", first[0].path, "the only linear before the last one")
        else:
            self._gated(first, down)
        self._place("ffn.down", down.path, "the last linear, whose result is added to the stream")
        self._span("ffn", down, reads, None)
        return _SubLayer("ffn", reads, _result(down))

    def _gated(self, first: Sequence[Call], down: Call) -> None:
        """Tell the linear branch from the one under the activation: doubled, it doubles all."""
        linear = [same(_argument(self.probe.doubled(call.path).calls[down.path][0]),
                       2 * _argument(down)) for call in first]
        if sum(linear) != 1:
            raise Doubt(f"{first[0].path}, {first[1].path}: {sum(linear)} of them enter linearly")
        for call, is_up in zip(first, linear, strict=True):
            role, why = ("up", "enters linearly") if is_up else ("gate", "enters by an activation")
            self._place(f"ffn.{role}", call.path, why)

    def _fused_gate(self, first: Sequence[Call], down: Call) -> None:
        path, width = first[0].path, _argument(down).shape[-1]
        linear = [same(_argument(self.probe.doubled(path, half).calls[down.path][0]),
                       2 * _argument(down)) for half in (0, 1)]
        if len(first) != 1 or _result(first[0]).shape[-1] != 2 * width or sum(linear) != 1:
            raise Doubt(f"{path}: neither as wide as {down.path} reads nor gate and up in halves")
        names = "up,gate" if linear[0] else "gate,up"
        self._place(f"ffn.{{{names}}}", path, "one half of its rows enters linearly", rows="halves")

    # --- spans, norms and the residual stream ----------------------------------------------------

    def _span(self, role: str, end: Call, reads: Tensor, interface: str | None) -> None:
        """Place the whole sub-layer: where its result is, and where its input can be read."""
        outer = end
        for call in self._around(end.path):
            if same(call.output, end.output):
                outer = call
        shown: dict[str, object] = {}
        if interface not in (None, outer.path):
            shown["interface"] = self._inside(str(interface))
        name = _named(outer, reads)
        if name is not None and outer.path != end.path:
            given = None if name == outer.first else {"argument": name}
            self._place(role, outer.path, "gives what its last linear gives", input=given, **shown)
            return
        for call in self._around(end.path):
            name, first = _named(call, reads), call.arguments.get(call.first or "")
            if name not in (None, call.first) and same(first, _argument(end)):
                self._ends_at(role, end, call, name, shown)
                return
        # No module is given both its input and its result: it is read where it begins.
        begin = next(call for call in self._calls(SiteKind.LINEAR) if same(_argument(call), reads))
        self._ends_at(role, end, begin, next(iter(begin.arguments)), shown)

    def _ends_at(self, role: str, end: Call, read: Call, name: str | None,
                 shown: Mapping[str, object]) -> None:
        source = {"module": self._inside(read.path), "argument": name}
        self.findings.append(Finding(role, self._inside(end.path), f"begins at {source['module']}",
                                     {"input": source, **shown}))

    def _around(self, path: str) -> Iterator[Call]:
        """Yield the calls of the modules around one, from the inside out, within the layer."""
        while (path := path.rpartition(".")[0]) != self.path and path:
            if path in self.probe.trace.calls:
                yield self._call(path)

    def _stream(self, parts: Sequence[_SubLayer]) -> None:
        """Follow the residual stream through the layer, placing the norms on its way."""
        layer = self._call(self.path)
        stream = next((tensor for tensor in layer.arguments.values()
                       if tensor.dim() == 3 and tensor.shape[-1] == self.hidden), None)
        if stream is None or layer.output is None:
            raise Doubt(f"{self.path}: no argument of it is the residual stream")
        start = stream
        for part in parts:
            # Side by side with the sub-layers before it, a part reads where they read.
            found = (self._reads(part, stream) or self._reads(part, start))
            if found is None:
                raise Doubt(f"{part.name} of {self.path}: reads neither the residual stream nor a "
                            "norm of it")
            norm, adds = found[0], self._normed(part)
            stream = stream + adds.reshape(stream.shape)
            if norm is not None:
                self._place_norm(part.name, norm, "pre")
                continue
            norm = self._norm(reads=stream)
            if norm is not None:
                self._place_norm(part.name, norm, "post")
                stream = _result(norm)
        if not same(stream, layer.output):
            raise Doubt(f"{self.path}: its result is not the residual stream with its sub-layers "
                        "added: something else happens in it")
        if len(self.norms) != 1:
            raise Doubt(f"{self.path}: norms before and after sub-layers: {self.norms or 'none'}")

    def _normed(self, part: _SubLayer) -> Tensor:
        """Return what is added to the stream: the part's result, or a norm of it."""
        norm = self._norm(part.adds)
        if norm is None:
            return part.adds
        self.norms.add("pre")
        self._place(f"norm.{part.name}_output", norm.path, "reads what the sub-layer gives")
        return _result(norm)

    def _reads(self, part: _SubLayer, stream: Tensor) -> tuple[Call | None] | None:
        """Return the norm of ``stream`` that the part reads, or (None,) if it reads ``stream``."""
        if same(part.reads, stream):
            return (None,)
        norm = self._norm(stream, part.reads)
        return None if norm is None else (norm,)

    def _norm(self, reads: Tensor, gives: Tensor | None = None) -> Call | None:
        return next((call for call in self._calls(SiteKind.NORM)
                     if same(_argument(call), reads)
                     and (gives is None or same(call.output, gives))), None)

    def _place_norm(self, part: str, norm: Call, where: str) -> None:
        self.norms.add(where)
        if norm.path in self.placed and where == "pre":
            return  # shared by sub-layers that stand side by side
        why = "gives what the sub-layer reads" if where == "pre" else "reads the sum"
        self._place(f"norm.{part}", norm.path, why)


def _argument(call: Call) -> Tensor:
    """Return the tensor that a linear or norm was given."""
    return next(iter(call.arguments.values()))


def _named(call: Call, tensor: Tensor) -> str | None:
    """Return the argument of a call that is this tensor."""
    return next((name for name, given in call.arguments.items() if same(given, tensor)), None)


def _result(call: Call) -> Tensor:
    if call.output is None:
        raise Doubt(f"{call.path}: returns no tensor")
    return call.output
