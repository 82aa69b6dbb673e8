"""What the forms of a module's weight edits cost, from the shapes of their functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftref.ir import work
from peftref.ir.device import Device
from peftref.ir.pattern import Chain, low_rank
from peftref.ir.primitive import Primitive
from peftref.ir.types import Stage, WriteNode
from peftref.ir.work import Shape, Work

__all__ = ["Priced", "price_factored", "price_formed"]


@dataclass(frozen=True, slots=True)
class Priced:
    """A write with what pricing has to know of its function.

    Attributes:
        write: the write.
        chain: its links, where they are a chain.
        operations: all its operations.
    """

    write: WriteNode
    chain: Chain | None
    operations: Sequence[Primitive]  # pyright: ignore[reportMissingTypeArgument]

    def shape(self, tokens: int) -> Shape:
        """Of the site, which may be a slice of the module."""
        return Shape(tokens, self.write.site.d_in, self.write.site.d_out)

    @property
    def flops(self) -> int:
        """Of the activation form, per token, forward."""
        return sum(op.flops() for op in self.operations)

    @property
    def matrix_flops(self) -> int:
        """Of the matrix form, forward."""
        columns = self.write.site.d_in * max((op.flops() for op in self.operations), default=0)
        return sum(op.matrix_flops() for op in self.operations) + columns


def price_factored(edits: Sequence[Priced], tokens: int, device: Device) -> tuple[Work, str]:
    """Return the work of maps of the stream, and how they run."""
    total, how = Work(), list[str]()
    for edit in edits:
        found, way = _factored(edit, edits, tokens, device)
        total += found
        how.append(way)
    return total, ", ".join(dict.fromkeys(w for w in how if w))


def _factored(
    edit: Priced, edits: Sequence[Priced], tokens: int, device: Device
) -> tuple[Work, str]:
    write, shape = edit.write, edit.shape(tokens)
    if write.stage is Stage.WEIGHT_NORM:
        return work.normalised(shape, _rank(edits, device)), ""
    if write.stage is Stage.WEIGHT_ROTATE:
        ways = work.rotated(shape, edit.flops)
        way = _cheapest({k: ways[k] for k in ("stream", "folded")}, device)
        # The rows of a slice are multiplied once more, with the change of the stream.
        again = Work(2 * shape.product) if write.site.rows is not None else Work()
        return ways[way] + again, way
    if write.needs_matrix:
        formed = Work(3 * shape.product + 3.0 * edit.matrix_flops, ((4, shape.weight),))
        return formed, "matrix"
    thin = None if edit.chain is None else low_rank(edit.chain)
    if thin is None:
        passes = ((4, shape.read), (4, shape.written))
        return Work(3.0 * tokens * edit.flops, passes), "eager"
    way = "split" if device.kernels else "accumulate"
    found = work.low_rank(shape, device.padded(thin.rank))[way]
    if thin.dropout and not device.kernels:
        found += Work(0, ((4, shape.read),))  # the mask is made twice, and multiplied with
    padded = device.padded(thin.rank)
    return found, way if padded == thin.rank else f"{way}, rank {thin.rank} padded to {padded}"


def price_formed(edits: Sequence[Priced], tokens: int) -> Work:
    """Return the work of the formed weight, whose gradient is that of the whole module."""
    site = edits[0].write.site
    rows = site.d_out if site.rows is None else site.rows.groups * site.rows.size
    whole = Shape(tokens, site.d_in, rows)
    forming = sum(
        site.d_out * edit.flops if edit.write.stage is Stage.WEIGHT_ROTATE else edit.matrix_flops
        for edit in edits
    )
    return Work(whole.product + 3.0 * forming, ((4, whole.weight),))


def _rank(edits: Sequence[Priced], device: Device) -> int:
    found = (low_rank(edit.chain) for edit in edits if edit.chain is not None)
    return sum(device.padded(thin.rank) for thin in found if thin is not None)


def _cheapest(ways: dict[str, Work], device: Device) -> str:
    return min(ways, key=lambda way: ways[way].seconds(device, "float32"))
