"""Every place of a backbone by role, not by module path. Plain data: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Argument", "AttentionShape", "RowSlice", "Site", "SiteKind", "SiteTable"]


class SiteKind(StrEnum):
    """What the owning module is, hence which ports it has and how edits are lowered."""

    LINEAR = "linear"  # input, output, weight, bias
    NORM = "norm"  # input, output, weight, bias
    EMBEDDING = "embedding"  # output, weight
    SPAN = "span"  # a whole sub-layer or block: input, output
    ATTENTION = "attention"  # a span that also has keys_values


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Output rows of a fused projection: ``arange(groups*size).view(groups, size)[:, start:][:length]``.

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
    """A tensor that reaches ``module.forward`` as the named argument."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts and width; ``interface`` is the path of the module that attends."""

    heads: int
    key_value_heads: int
    head_width: int
    interface: str
    causal: bool


@dataclass(frozen=True, slots=True)
class Site:
    """One place: a role in a layer of a stack, and how to reach its ports.

    Attributes:
        role: ``attention.query``, ``ffn``, ``norm.final``, ...
        stack: ``encoder`` or ``decoder``.
        layer: index in the stack; None outside the layers.
        module: dotted path of the module whose result is the ``output`` port.
        kind: what that module is.
        d_in: width of the ``input`` port (0: none).
        d_out: width of the ``output`` port.
        bias: whether the module has a bias.
        transposed: whether the weight is stored (d_in, d_out), as GPT-2's Conv1D.
        rows: the rows of a fused projection that are this site; None: all.
        input: where the input port is read; None: first argument of ``module``. When it names
            an *enclosing* module, that module hands its first argument on to ``module``.
        attention: head shape where the site has ``keys_values``.
        shared_by: layers that run this very module (ALBERT); 1 otherwise.
        tied: path of another module that owns the same weight tensor (tied head).
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

    @property
    def label(self) -> str:
        """Printable place: ``decoder.3.attention.query``."""
        parts = [self.stack, "" if self.layer is None else str(self.layer), self.role]
        return ".".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class SiteTable:
    """All sites of one backbone.

    Attributes:
        family: name of the row that made it (``llama``), or ``modules`` for raw modules only.
        hidden_size: width of the residual stream.
        vocabulary: rows of the token embedding.
        layers: number of layers per stack.
        sites: in execution order.
        modules: path -> (class name, d_in, d_out, has bias, transposed) of every module that a
            raw ``module:`` selector may name.
        head_modules: paths of task-head modules (not part of the backbone's own sites).
        frozen_parameters: number of parameters of the backbone.
        pre_norm: whether norms come before the sub-layers.
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

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def roles(self) -> tuple[str, ...]:
        """All role names, in execution order."""
        return tuple(dict.fromkeys(site.role for site in self.sites))
