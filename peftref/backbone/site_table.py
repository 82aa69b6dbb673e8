"""Every place of a backbone by role, not by module path. Plain data: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from peftref.spec.typology import Port

if TYPE_CHECKING:
    from peftref.backbone.family import Family

__all__ = ["ADDED", "Argument", "AttentionShape", "CacheArgument", "RowSlice", "Site", "SiteKind",
           "SiteTable"]

ADDED = "peftref"
"""Name of the child module under which peftref registers what it adds to a module of a model.

The site table, the parameter count and the weight hash of a backbone leave it out, so they are
the same before and after an adapter is attached.
"""


class SiteKind(StrEnum):
    """What the owning module is, hence which ports it has and how edits are lowered."""

    LINEAR = "linear"  # input, output, weight, bias
    NORM = "norm"  # input, output, weight, bias
    EMBEDDING = "embedding"  # output, weight
    MATRIX = "matrix"  # a matrix that its module reads itself: weight, bias, folded writes
    SPAN = "span"  # a whole sub-layer or block: input, output
    ATTENTION = "attention"  # a span that also has keys_values
    STACK = "stack"  # all layers of a stack: hidden_states, output


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Output rows of a fused projection.

    ``arange(groups * size).view(groups, size)[:, start : start + length]``

    One rule for all known layouts: thirds and grouped-query blocks have one group; per-head
    interleaving has one group a head.
    """

    groups: int
    size: int
    start: int
    length: int

    @property
    def rows(self) -> int:
        """Number of rows selected."""
        return self.groups * self.length


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that reaches ``module.forward`` as the named argument, by position or keyword."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class CacheArgument:
    """Where a prefix enters attention that calls no attention interface.

    ``name`` is the argument that takes the cache, ``pad`` the arguments that count keys and what
    a prefix gets in each, ``windows`` a buffer of visible keys (see ``family.CacheRule``).
    """

    name: str
    pad: tuple[tuple[str, str], ...]
    windows: str | None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts and width of one attention sub-layer.

    ``interface`` is the path of the module whose forward calls transformers' attention
    interface; None where the family calls none, so that no prefix can be inserted. Where ``cache``
    is given, that module calls none but takes a cache, by which a prefix enters; where ``form``
    is given, a forward of ours stands for its own (see ``family.Place``). ``value_width`` is the
    width of a head's value where it is not ``head_width``.
    """

    heads: int
    key_value_heads: int
    head_width: int
    interface: str | None
    causal: bool
    cache: CacheArgument | None = None
    form: str | None = None
    value_width: int | None = None

    @property
    def row_width(self) -> int:
        """Width of one row of keys and values, side by side."""
        return self.key_value_heads * (self.head_width + (self.value_width or self.head_width))

    @property
    def calls_interface(self) -> bool:
        """Whether transformers' attention interface is where a prefix enters."""
        return self.interface is not None and self.cache is None and self.form is None


@dataclass(frozen=True, slots=True)
class Site:
    """One place: a role in a layer of a stack, and how to reach its ports.

    Attributes:
        role: ``attention.query``, ``ffn``, ``norm.final``, ...
        stack: ``encoder`` or ``decoder``; ``text`` or ``vision`` where two towers stand side by
            side.
        layer: index in the stack; None outside the layers.
        module: dotted path of the module whose result is the ``output`` port; where it returns
            a tuple, the port is the first element.
        kind: what that module is.
        d_in: width of the ``input`` port (0: none).
        d_out: width of the ``output`` port.
        bias: whether the module has a bias.
        transposed: whether the weight is stored (d_in, d_out), as GPT-2's Conv1D.
        rows: the rows of a fused projection that are this site; None: all.
        input: where the input port is read; None: first argument of ``module``. When it names
            an *enclosing* module, that module hands its first argument on to ``module``; when
            it names one beside ``module``, that one runs before it in every call of the layer.
        attention: head shape where the site has ``keys_values``.
        tensor: name of the weight in its module.
        expert: which matrix of a stack of them (a tensor with three dimensions); None: no stack.
        shared_by: layers that run this very module (ALBERT); 1 otherwise.
        tied: path of another module that owns the same weight tensor (tied head).
        beyond_tokens: whether it runs on more than the tokens of the batch, so that an edit that
            depends on the sample has no meaning there.
        no_rows: why no learned rows can stand among its results; "" where they can.
    """

    role: str
    stack: str
    layer: int | None
    module: str
    kind: SiteKind
    d_in: int
    d_out: int
    bias: bool = False
    transposed: bool = False
    rows: RowSlice | None = None
    input: Argument | None = None
    attention: AttentionShape | None = None
    shared_by: int = 1
    tied: str | None = None
    beyond_tokens: bool = False
    no_rows: str = ""
    tensor: str = "weight"
    expert: int | None = None

    @property
    def bias_tensor(self) -> str:
        """Name of the bias that goes with the weight."""
        return "bias" if self.tensor == "weight" else f"{self.tensor}_bias"

    @property
    def label(self) -> str:
        """Printable place: ``decoder.3.attention.query``."""
        parts = [self.stack, "" if self.layer is None else str(self.layer), self.role]
        parts.append("" if self.expert is None else str(self.expert))
        return ".".join(part for part in parts if part)

    @property
    def reads_stack(self) -> str:
        """Whose tokens it reads: keys and values of cross-attention are the encoder's."""
        crosses = self.role in ("cross_attention.key", "cross_attention.value")
        return "encoder" if crosses else self.stack

    @property
    def ports(self) -> frozenset[Port]:
        """The ports that this site has."""
        both = {Port.INPUT, Port.OUTPUT}
        if self.role.startswith("residual.") or self.kind is SiteKind.SPAN:
            return frozenset(both)
        if self.kind is SiteKind.STACK:
            return frozenset({Port.OUTPUT, Port.HIDDEN_STATES})
        if self.kind is SiteKind.ATTENTION:
            return frozenset(both | {Port.KEYS_VALUES})
        own = {Port.WEIGHT, Port.BIAS} if self.bias else {Port.WEIGHT}
        if self.kind is SiteKind.EMBEDDING:
            return frozenset({Port.OUTPUT, Port.WEIGHT})
        return frozenset(both | own)


@dataclass(frozen=True, slots=True)
class SiteTable:
    """All sites of one backbone.

    Attributes:
        family: name of the row that made it (``llama``), or ``modules`` for raw modules only.
        hidden_size: width of the residual stream.
        vocabulary: rows of the token embedding.
        layers: number of layers per stack.
        sites: in execution order.
        modules: path -> site (role ``module:<path>``) of every module that a raw ``module:``
            selector may name; kind ``SPAN`` and widths 0 where the module says nothing.
        head_modules: paths of task-head modules (not part of the backbone's own sites).
        frozen_parameters: number of parameters of the backbone, task heads left out and a tied
            tensor counted once.
        pre_norm: whether norms come before the sub-layers.
        row: the row that made it, where that is none of the built-in ones; no part of equality.
    """

    family: str
    hidden_size: int
    vocabulary: int
    layers: dict[str, int]
    sites: tuple[Site, ...]
    modules: dict[str, Site] = field(default_factory=dict)
    head_modules: tuple[str, ...] = ()
    frozen_parameters: int = 0
    pre_norm: bool = True
    row: Family | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def roles(self) -> tuple[str, ...]:
        """All role names, in execution order."""
        return tuple(dict.fromkeys(site.role for site in self.sites))
