"""What holds for every edit, from the algebra of its primitives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.backbone.site_table import SiteKind
from peftref.errors import CompositionError
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import IDENTITY, Algebra
from peftref.ir.types import OperationNode, ReadNode, Stage, TensorNode, WriteNode
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = ["DeriveProperties"]

_STREAMS = (Stage.INPUT, Stage.PARALLEL, Stage.OUTPUT)
_WITH_MATRIX = (SiteKind.LINEAR, SiteKind.MATRIX)
_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD, IntegrationKind.GATED_ADD)


@dataclass(frozen=True, slots=True)
class DeriveProperties:
    """The algebra of each function, and from it the stage of each edit in the fold."""

    name: str = "derive properties"

    def run(self, graph: AdapterGraph) -> str:
        on_weight = 0
        normalised = {
            (write.member, write.path) for _, write in graph.writes()
            if write.port is Port.WEIGHT and write.kind is IntegrationKind.REPLACE
        }
        for address, write in graph.writes():
            algebra = self._algebra(graph, graph.value(address))
            gate = graph.gate(address)
            stage = _stage(write, algebra)
            if gate is not None:
                together = (write.member, write.path) in normalised
                stage = _gated_stage(write, stage, together=together)
                algebra = _with_gate(algebra, self._algebra(graph, gate))
            if stage in _STREAMS and not algebra.stream and gate is None:
                raise _refuse(write, "a product of matrices has no activation form: it is added to "
                              "the weight of a linear site")
            on_weight += stage.on_weight
            graph.set(address, replace(write, algebra=algebra, stage=stage))
        return f"{on_weight} edits fold into a weight"

    @staticmethod
    def _algebra(graph: AdapterGraph, address: int) -> Algebra:
        known: dict[int, Algebra] = {}
        for ancestor in graph.ancestors(address):
            node = graph.node(ancestor)
            if isinstance(node, ReadNode):
                known[ancestor] = IDENTITY
            elif isinstance(node, OperationNode) and not node.primitive.on_tensors:
                streams = [i for i in graph.inputs(ancestor) if i in known]
                streams = [i for i in streams if not isinstance(graph.node(i), TensorNode)]
                known[ancestor] = node.primitive.combine(tuple(known[i] for i in streams))
        return known[address]


def _stage(write: WriteNode, algebra: Algebra) -> Stage:
    """Place in the fold; refuses what has no meaning.

    ================  ============================  ====================================
    port              insertion, integration        stage
    ================  ============================  ====================================
    weight            parallel, add                 WEIGHT_ADD
    weight            sequential, rotate            WEIGHT_ROTATE
    weight            sequential, replace           WEIGHT_NORM
    weight            sequential, replace, base     WEIGHT_BASE
    bias              parallel, add                 BIAS
    output            parallel, add, linear map     WEIGHT_ADD (on a linear)
    output            parallel, any other           PARALLEL
    output            sequential                    OUTPUT
    input             sequential                    INPUT
    keys_values       parallel, concat or add       KEYS_VALUES
    output (tokens)   parallel, concat              TOKENS
    output of a layer that runs on two streams      STREAMS
    ================  ============================  ====================================
    """
    if write.streams is not None:
        return Stage.STREAMS
    sequential = write.insertion is InsertionForm.SEQUENTIAL
    if write.port in (Port.WEIGHT, Port.BIAS):
        return _weight_stage(write, algebra, sequential=sequential)
    if write.kind is IntegrationKind.CONCAT:
        return _sequence_stage(write, algebra, sequential=sequential)
    if write.port is Port.KEYS_VALUES:
        apart = write.kind in (IntegrationKind.ADD, IntegrationKind.GATED_ADD)
        if not apart or sequential or not algebra.source:
            raise _refuse(write, "port keys_values takes learned rows ('tokens') in parallel: "
                          "concat, or add for attention over them alone")
        return Stage.KEYS_VALUES
    if write.kind is IntegrationKind.ROTATE:
        raise _refuse(write, "rotate acts on port weight")
    if sequential:
        return _sequential_stage(write, algebra)
    if write.read is Port.BOTH:
        raise _refuse(write, "input and output are read by an edit of the output, in sequence")
    if write.port is Port.INPUT:
        raise _refuse(write, "nothing runs beside an input; use insertion sequential")
    if write.kind is IntegrationKind.REPLACE:
        raise _refuse(write, "replace is sequential: it needs the stream that it replaces")
    folds = write.kind in _ADDS and algebra.linear and algebra.matrix
    if folds and write.site.kind in _WITH_MATRIX and write.read is Port.INPUT:
        return Stage.WEIGHT_ADD
    return Stage.PARALLEL


def _sequential_stage(write: WriteNode, algebra: Algebra) -> Stage:
    own = write.read is write.port
    if write.kind is IntegrationKind.RESCALE and own and not algebra.diagonal:
        raise _refuse(write, "a sequential rescale needs an elementwise scale ('vector'), or "
                      "reads another port ('read'), whose function the stream is multiplied by")
    if write.port is Port.INPUT and write.read is Port.BOTH:
        raise _refuse(write, "an edit of the input reads the input or the output")
    return Stage.INPUT if write.port is Port.INPUT else Stage.OUTPUT


def _gated_stage(write: WriteNode, stage: Stage, *, together: bool) -> Stage:
    """Where a gated edit stands: ``y + g (edit(y) - y)`` needs a stream to be gated.

    An addition to a weight becomes a parallel write, a rotation an edit of the input; a
    normalisation and a bias stay, the difference they make is gated; ``together`` with what the
    same member adds to the weight that it normalises. Learned tokens have no stream.
    """
    if together and stage.on_weight and stage is not Stage.WEIGHT_ROTATE:
        return stage
    if write.positions is not None and stage is Stage.KEYS_VALUES:
        raise _refuse(write, "every query sees all rows of a prefix: it has no positions")
    if stage is Stage.TOKENS:
        raise _refuse(write, "a prompt cannot be gated: a gate reads what the site reads, and an "
                      "embedding reads token ids")
    if stage is Stage.KEYS_VALUES and write.kind is not IntegrationKind.CONCAT:
        raise _refuse(write, "attention over rows alone has a gate of its own, and takes no other")
    if stage is Stage.WEIGHT_BASE:
        raise _refuse(write, "what stands in for the weight itself cannot be gated")
    if write.read is Port.HIDDEN_STATES:
        raise _refuse(write, "an edit that reads the states of all layers cannot be gated: a gate "
                      "reads one stream")
    if stage is Stage.WEIGHT_ADD and write.site.kind is SiteKind.EMBEDDING:
        raise _refuse(write, "the weight of an embedding cannot be gated: it reads token ids")
    if stage is Stage.WEIGHT_ADD and write.site.kind is SiteKind.LINEAR:
        return Stage.PARALLEL
    if stage is Stage.WEIGHT_ROTATE:
        return Stage.INPUT
    return stage


def _with_gate(algebra: Algebra, gate: Algebra) -> Algebra:
    return replace(
        algebra, per_sample=True, random=algebra.random or gate.random,
        mixes_tokens=algebra.mixes_tokens or gate.mixes_tokens,
    )


def _sequence_stage(write: WriteNode, algebra: Algebra, *, sequential: bool) -> Stage:
    if not algebra.source or sequential:
        raise _refuse(write, "concat joins learned rows ('tokens'), in parallel")
    if write.port is Port.KEYS_VALUES:
        return Stage.KEYS_VALUES
    if write.site.kind is SiteKind.EMBEDDING:
        return Stage.TOKENS
    raise _refuse(write, "concat goes with port keys_values or the token embedding's output")


def _weight_stage(write: WriteNode, algebra: Algebra, *, sequential: bool) -> Stage:
    if not algebra.matrix or (algebra.affine and not algebra.linear):
        raise _refuse(write, "a function on a weight or bias needs a matrix form (linear maps)")
    if write.port is Port.BIAS:
        if sequential or write.kind not in _ADDS or not algebra.source:
            raise _refuse(write, "port bias takes a parallel add of 'delta'")
        return Stage.BIAS
    if not sequential and write.kind in _ADDS:
        if write.site.kind not in _WITH_MATRIX and not algebra.source:
            raise _refuse(write, f"the weight of a {write.site.kind.value} takes only 'delta'")
        return Stage.WEIGHT_ADD
    if write.site.kind not in _WITH_MATRIX:
        raise _refuse(write, "only the weight of a linear site can be rotated or replaced")
    if sequential and write.kind is IntegrationKind.ROTATE and algebra.orthogonal:
        return Stage.WEIGHT_ROTATE
    if sequential and write.kind is IntegrationKind.REPLACE and not algebra.stream:
        return Stage.WEIGHT_BASE if algebra.base else Stage.WEIGHT_NORM
    raise _refuse(write, "port weight takes: parallel add, sequential rotate (an orthogonal "
                  "function), sequential replace ('column_norm', 'quantise')")


def _refuse(write: WriteNode, rule: str) -> CompositionError:
    found = f"{write.insertion.value} {write.kind.value} on port {write.port.value}"
    return CompositionError(f"{write.label}: {rule}; found {found}")
