"""Which op computes a chain of links at once: a table, read by pricing, fusing and lowering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import OperationNode, ReadNode, Stage, WriteNode
from peftref.spec.typology import InsertionForm, IntegrationKind

if TYPE_CHECKING:
    from peftref.ir.primitive import Primitive

__all__ = ["Chain", "LowRank", "chain_of", "low_rank", "match"]

Chain = Sequence["Primitive"]  # pyright: ignore[reportMissingTypeArgument]
"""The links between the stream that is read and what is written, in order."""

_THIN = 4  # a product through 1/4 of the narrower width or less is worth two products
_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD)
_BOTTLENECK = ("affine", "activation", "affine")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A linear chain through a narrow middle.

    Attributes:
        start: the first link that is no dropout; ``split``: the first link behind the middle.
        rank: width of the middle.
        dropout: share of the input's entries that is dropped.
    """

    start: int
    split: int
    rank: int
    dropout: float = 0.0


def chain_of(graph: AdapterGraph, address: int) -> Chain | None:
    """Return the links of a write's function, the first one first; None: it is no chain."""
    links: list[Primitive] = []
    at = graph.value(address)
    while isinstance(node := graph.node(at), OperationNode):
        links.append(node.primitive)
        streams = [i for i in graph.inputs(at) if _is_stream(graph, i)]
        if len(streams) != 1:
            return None
        at = streams[0]
    return links[::-1] if isinstance(node, ReadNode) else None


def _is_stream(graph: AdapterGraph, address: int) -> bool:
    node = graph.node(address)
    if isinstance(node, OperationNode):
        return not node.primitive.on_tensors
    return isinstance(node, ReadNode)


def low_rank(chain: Chain) -> LowRank | None:
    """Return where a chain is ``(x A^T) B^T`` with thin A and B; None: nowhere.

    Also with more than two links: VeRA's scales, a square matrix in the middle.
    """
    start, dropout = 0, 0.0
    if chain and chain[0].link is not None and chain[0].link.kind == "dropout":
        start, dropout = 1, float(chain[0].link.value)
    links = chain[start:]
    algebras = [link.algebra() for link in links]
    if not all(a.linear and a.matrix and a.stream and not a.source for a in algebras):
        return None
    if any(a.random or a.per_sample for a in algebras) or len(links) < 2:
        return None
    widths = [link.width for link in links[:-1]]
    rank = min(widths)
    if rank * _THIN > min(links[0].place.d_in, links[-1].width):
        return None
    return LowRank(start, start + widths.index(rank) + 1, rank, dropout)


def match(write: WriteNode, chain: Chain | None) -> str:
    """Return the name of the op that a write is lowered to; empty: none.

    ==================  ================================  =========================================
    op                  stage                             chain
    ==================  ================================  =========================================
    lora_linear         addition to a weight              dropout or not, linear, narrow middle
    dora_linear         norms of a weight                 norm
    rotated_linear      rotation of a weight              rotate
    bottleneck          parallel or sequential addition   affine, activation, affine
    scale_shift         sequential rescale                scale
    prefix_attention    keys and values                   any
    ==================  ================================  =========================================
    """
    if write.gated or write.positions is not None or write.looks_back:
        return ""  # the change is scaled row by row: it has to stand alone
    if write.stage is Stage.KEYS_VALUES:
        return "prefix_attention"
    kinds = tuple("" if p.link is None else p.link.kind for p in chain or ())
    if write.stage is Stage.WEIGHT_ADD:
        return "lora_linear" if chain and low_rank(chain) is not None else ""
    whole = write.site.rows is None
    if write.stage is Stage.WEIGHT_NORM and whole and kinds == ("norm",):
        return "dora_linear"
    if write.stage is Stage.WEIGHT_ROTATE and whole and kinds == ("rotate",):
        return "rotated_linear"
    if write.stage in (Stage.PARALLEL, Stage.OUTPUT) and whole and kinds == _BOTTLENECK:
        return "bottleneck" if write.kind in _ADDS else ""
    sequential = write.insertion is InsertionForm.SEQUENTIAL
    if sequential and write.kind is IntegrationKind.RESCALE and whole and kinds == ("scale",):
        return "scale_shift"
    return ""
