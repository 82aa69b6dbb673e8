"""Nodes of the adapter graph. Plain frozen data; shapes but no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from peftref.backbone.site_table import Site, SiteKind
from peftref.spec.selector import Positions
from peftref.spec.technique import Expression
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

if TYPE_CHECKING:
    from peftref.ir.primitive import Algebra, Primitive, TensorSpec

__all__ = ["SEAM", "Form", "FunctionNode", "Node", "OperationNode", "ReadNode", "Stage", "Streams",
           "TensorNode", "WriteNode"]


SEAM = "norm.attention"
"""The role that ends the first half of a layer whose norms come behind its sums."""


class Stage(IntEnum):
    """Where an edit stands in the left fold of its module; smaller comes first."""

    TOKENS = 0
    INPUT = 1
    WEIGHT_BASE = 2
    WEIGHT_ADD = 3
    WEIGHT_ROTATE = 4
    WEIGHT_NORM = 5
    BIAS = 6
    PARALLEL = 7
    OUTPUT = 8
    KEYS_VALUES = 9
    STREAMS = 10

    @property
    def on_weight(self) -> bool:
        """Whether edits of this stage act on the weight matrix."""
        return Stage.WEIGHT_BASE <= self <= Stage.WEIGHT_NORM


class Form(IntEnum):
    """How an edit of the weight is evaluated."""

    FACTORED = 0  # as a map of the stream, the weight is never formed
    FORMED = 1  # the effective weight is formed, once a step


@dataclass(frozen=True, slots=True)
class ReadNode:
    """A tensor of the backbone that a function reads."""

    site: Site
    port: Port

    @property
    def width(self) -> int:
        """Width of the tensor."""
        if self.port is Port.BOTH:
            return self.site.d_in + self.site.d_out
        return self.site.d_out if self.port is Port.OUTPUT else self.site.d_in


@dataclass(frozen=True, slots=True)
class FunctionNode:
    """A function that is still an expression."""

    expression: Expression


@dataclass(frozen=True, slots=True)
class OperationNode:
    """One primitive at one site; inputs are streams first, tensors after."""

    primitive: Primitive  # pyright: ignore[reportMissingTypeArgument,reportUnknownVariableType]

    @property
    def width(self) -> int:
        """Width of the result."""
        return self.primitive.width


@dataclass(frozen=True, slots=True)
class TensorNode:
    """A tensor of the adapter; ``key`` is its full name when every site has its own."""

    spec: TensorSpec
    member: str
    module: str
    key: str


@dataclass(frozen=True, slots=True)
class Streams:
    """How a layer that runs on two streams is made of two functions.

    ``y1 = a x1 + F(x2)``, ``y2 = b x2 + G(y1)``

    Attributes:
        layer: which function the frozen layer is; ``halves``: attention the first, the rest the
            second.
        scales: ``a`` and ``b``.
        swaps: whether ``y2`` is the first stream of the next layer.
        stack: stack of the layer.
        index: rank among the ``count`` layers that run on these streams.
        inversions: layers in a row whose inputs are computed back; None: as rounding allows.
    """

    layer: Literal["first", "second", "halves"]
    scales: tuple[float, float]
    swaps: bool
    stack: str
    index: int
    count: int
    inversions: int | None = None

    @property
    def opens(self) -> bool:
        """Whether one stream enters."""
        return self.index == 0

    @property
    def closes(self) -> bool:
        """Whether one stream leaves: the mean of the two."""
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class WriteNode:
    """The integration of one function at one site.

    Attributes:
        member: member of the composition; ``module``: module of its technique.
        site: where; ``port``: what is written.
        read: the port that the function reads.
        insertion: sequential or parallel; ``kind`` and ``scale``: the integration.
        order: rank of (member, module) in the composition.
        after: edits that must come first.
        key: name of the edit inside the module that is swapped.
        stage: place in the fold; None until properties are derived.
        algebra: what holds for the function; None until properties are derived.
        form: how a weight edit is evaluated; None until a lowering is chosen.
        why: what that choice was made from.
        accumulates: whether the last product of the function adds into the stream by itself.
        op: name of the op that computes the function and joins it at once; empty: none does.
        group: name of the group of modules that read one stream and that one op computes.
        positions: the tokens at which it acts; None: all.
        gated: whether the change is scaled by a gate, ``y + g (edit(y) - y)``.
        streams: of a layer that runs on two streams, of which this is one of the functions.
        aside: whether it takes no part until a procedure asks for it (a teacher).
    """

    member: str
    module: str
    site: Site
    port: Port
    read: Port
    insertion: InsertionForm
    kind: IntegrationKind
    scale: float | None
    order: tuple[int, int]
    after: tuple[str, ...]
    key: str
    stage: Stage | None = None
    algebra: Algebra | None = None
    form: Form | None = None
    why: str = ""
    accumulates: bool = False
    op: str = ""
    group: str = ""
    positions: Positions | None = None
    gated: bool = False
    streams: Streams | None = None
    aside: bool = False

    @property
    def path(self) -> str:
        """Path of the backbone module that is swapped to make this edit."""
        shape = self.site.attention
        if self.port is Port.KEYS_VALUES and shape is not None and shape.interface is not None:
            return shape.interface
        return self.site.module

    @property
    def needs_matrix(self) -> bool:
        """Whether it adds to a weight and has no activation form but its own matrix."""
        algebra = self.algebra
        no_stream = algebra is not None and (not algebra.stream or algebra.source)
        if self.stage is Stage.PARALLEL:
            return self.gated and (self.port is Port.WEIGHT or no_stream)
        return self.stage is Stage.WEIGHT_ADD and no_stream

    @property
    def must_form(self) -> bool:
        """Whether the effective weight must be formed.

        Of a matrix that its module reads itself, and for a slice's own input rotation.
        """
        if self.site.kind is SiteKind.MATRIX:
            return self.stage is not None and self.stage.on_weight
        return self.stage is Stage.WEIGHT_ROTATE and self.site.rows is not None

    @property
    def looks_back(self) -> bool:
        """Whether an edit of an output also reads what entered."""
        return self.stage is Stage.OUTPUT and self.read in (Port.INPUT, Port.BOTH)

    @property
    def ends_a_span(self) -> bool:
        """Whether this edits a whole sub-layer at the module that writes its result.

        Such an edit comes after all that the module itself does, and reads a tensor that an
        enclosing module hands in.
        """
        argument = self.site.input
        outside = argument is not None and argument.module != self.site.module
        return outside and self.port is not Port.KEYS_VALUES

    @property
    def label(self) -> str:
        """Printable name: ``lora.delta @ decoder.0.attention.query``."""
        return f"{self.member}.{self.module} @ {self.site.label}"


Node = ReadNode | FunctionNode | OperationNode | TensorNode | WriteNode
