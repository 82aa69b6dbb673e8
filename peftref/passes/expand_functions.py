"""From expressions to operations, with shapes and tensors."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from peftref.backbone.site_table import SiteKind
from peftref.errors import CompositionError, SpecError
from peftref.ir.gating import AtPositions, add_gate
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Place, TensorSpec
from peftref.ir.types import FunctionNode, OperationNode, ReadNode, TensorNode, WriteNode
from peftref.passes.base import Library, wrong_argument
from peftref.spec.technique import Expression
from peftref.spec.typology import Port

__all__ = ["ExpandFunctions"]

_COMBINATORS = ("sum", "product", "since_start")


@dataclass(frozen=True, slots=True)
class ExpandFunctions:
    """Case 1: a chain becomes its links, each reading the one before.

    Case 2: a combinator becomes one operation over its branches.
    Case 3: a primitive becomes one operation with its tensors.
    Shapes are inferred on the way: the width of a link is the width that reaches it, and the last
    link must give the width of the port written.
    """

    library: Library
    name: str = "expand functions and infer shapes"

    def run(self, graph: AdapterGraph) -> str:
        operations = tensors = 0
        for address, write in graph.writes():
            (function,) = graph.inputs(address)
            node = graph.node(function)
            if not isinstance(node, FunctionNode):
                continue
            (source,) = graph.inputs(function)
            result = self._expand(graph, node.expression, source, write)
            self._check_width(graph, result, write)
            graph.set_inputs(address, (result,))
            graph.remove(function)
            if write.positions is not None:
                self._restrict(graph, address, write, source)
            operations += len(graph.operations_of(address))
            tensors += len(graph.tensors_of(address))
        self._check_unique(graph)
        return f"{operations} operations, {tensors} tensors"

    def _expand(
        self, graph: AdapterGraph, expression: Expression, source: int, write: WriteNode
    ) -> int:
        if expression.name == "chain":
            if not expression.children:
                raise SpecError("a chain needs at least one function", mark=expression.mark)
            for child in expression.children:
                source = self._expand(graph, child, source, write)
            return source
        if expression.children:
            if expression.name not in _COMBINATORS:
                raise SpecError(
                    f"{expression.name!r} takes arguments, not a list of functions; "
                    f"lists: chain, {', '.join(_COMBINATORS)}",
                    mark=expression.mark,
                )
            branches = tuple(
                self._expand(graph, child, source, write) for child in expression.children
            )
            return self._operation(graph, expression, branches, write)
        return self._operation(graph, expression, (source,), write)

    def _operation(
        self,
        graph: AdapterGraph,
        expression: Expression,
        streams: tuple[int, ...],
        write: WriteNode,
    ) -> int:
        try:
            kind = self.library.primitive(expression.name)
        except SpecError as error:
            raise SpecError(str(error), mark=expression.mark) from None
        try:
            arguments = kind.Arguments(**expression.arguments)
        except ValidationError as error:
            raise wrong_argument(
                expression.name, error, kind.Arguments, expression.mark
            ) from None
        before = graph.node(streams[0])
        d_in = before.width if isinstance(before, ReadNode | OperationNode) else 0
        place = Place(
            d_in,
            port_width(write),
            graph.table.hidden_size,
            _port_shape(write, graph.table.vocabulary),
            write.site.stack,
            write.site.attention.key_value_heads if write.site.attention is not None else 0,
            graph.table.layers.get(write.site.stack, 0),
        )
        try:
            primitive = kind(arguments, place)
        except CompositionError as error:
            raise CompositionError(f"{write.label}: {error}", mark=expression.mark) from None
        if primitive.reads_weight and write.site.kind is not SiteKind.LINEAR:
            raise CompositionError(
                f"{write.label}: {expression.name!r} reads the weight of a linear module, and "
                f"this is a {write.site.kind.value}; select linear sites",
                mark=expression.mark,
            )
        self._check_starts(primitive.tensors(), write, expression)
        inputs: list[int] = [] if primitive.algebra().source else list(streams)
        for spec in primitive.tensors():
            _check_rank(spec, place, write)
            inputs.append(graph.add(_tensor(spec, write)))
        return graph.add(OperationNode(primitive), tuple(inputs))

    @staticmethod
    def _check_starts(
        tensors: tuple[TensorSpec, ...], write: WriteNode, expression: Expression
    ) -> None:
        """Parts of a weight are those of a matrix, which a norm or a whole sub-layer has not."""
        matrices = (SiteKind.LINEAR, SiteKind.MATRIX, SiteKind.EMBEDDING)
        for spec in tensors:
            if spec.from_backbone and write.site.kind not in matrices:
                raise CompositionError(
                    f"{write.label}: tensor {spec.name!r} starts at {spec.init} of the weight of "
                    f"a linear site; found a {write.site.kind.value}",
                    mark=expression.mark,
                )

    @staticmethod
    def _restrict(graph: AdapterGraph, address: int, write: WriteNode, source: int) -> None:
        """Let the edit act at its positions only."""
        if write.positions is None:
            return
        stack = write.site.reads_stack
        place = Place(1, 1, graph.table.hidden_size, stack=stack)
        gate = OperationNode(AtPositions(write.positions.key, place))
        add_gate(graph, address, graph.add(gate, (source,)))

    @staticmethod
    def _check_width(graph: AdapterGraph, result: int, write: WriteNode) -> None:
        node = graph.node(result)
        width = node.width if isinstance(node, OperationNode | ReadNode) else 0
        if write.port in (Port.WEIGHT, Port.BIAS):
            return
        if width != port_width(write):
            raise CompositionError(
                f"{write.label}: the function gives width {width}, the port {write.port.value!r} "
                f"has width {port_width(write)}; leave out 'out' in the last primitive to take "
                "the port's width"
            )

    @staticmethod
    def _check_unique(graph: AdapterGraph) -> None:
        seen: dict[str, str] = {}
        for address, write in graph.writes():
            names: dict[str, TensorSpec] = {}
            for _, tensor in graph.tensors_of(address):
                # What is shared by name may be used twice in one function (PHM's rule).
                known = names.get(tensor.spec.name)
                if known is not None and (known.share is None or known != tensor.spec):
                    raise SpecError(
                        f"{write.label}: two primitives have a tensor named "
                        f"{tensor.spec.name!r}; give one of them another 'name'"
                    )
                names[tensor.spec.name] = tensor.spec
            place = f"{write.path}:{write.key}"
            if place in seen:
                raise CompositionError(
                    f"{write.member}.{write.module} is inserted twice at {write.path}: as "
                    f"{seen[place]} and as {write.site.label}; select one of the two roles"
                )
            seen[place] = write.site.label


def _check_rank(spec: TensorSpec, place: Place, write: WriteNode) -> None:
    """A matrix has no more parts than its smaller side."""
    if not spec.init.startswith(("svd_", "qr_", "loftq_")):
        return
    columns = spec.init.partition("(")[0].endswith(("up", "left"))
    parts, most = spec.shape[1 if columns else 0], min(place.port_shape)
    if parts > most:
        raise CompositionError(
            f"{write.label}: {spec.name!r} starts at {parts} parts of the weight ({spec.init}), "
            f"which has {most}; lower the rank"
        )


def _tensor(spec: TensorSpec, write: WriteNode) -> TensorNode:
    return TensorNode(spec, write.member, write.module, f"{write.path}.{write.key}.{spec.name}")


def port_width(write: WriteNode) -> int:
    """Width of the tensor that a write joins: rows of keys and values are side by side."""
    if write.port is Port.INPUT:
        return write.site.d_in
    if write.port is Port.KEYS_VALUES and write.site.attention is not None:
        return write.site.attention.row_width
    return write.site.d_out


def _port_shape(write: WriteNode, vocabulary: int) -> tuple[int, ...]:
    site = write.site
    if site.kind is SiteKind.EMBEDDING:
        return (vocabulary, site.d_out)
    if write.port is Port.BIAS or (write.port is Port.WEIGHT and site.kind is SiteKind.NORM):
        return (site.d_out,)
    return (site.d_out, site.d_in)
