"""How each edit of a weight is evaluated: as a map of the stream, or as a formed weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.errors import CompositionError
from peftref.ir.device import DEVICES, Device
from peftref.ir.graph import AdapterGraph
from peftref.ir.pattern import chain_of
from peftref.ir.types import Form, Stage, WriteNode
from peftref.passes.check_rules import turns_slices
from peftref.passes.price_forms import Priced, price_factored, price_formed

__all__ = ["ChooseLowering"]

_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ChooseLowering:
    """One form for all weight edits of a module, the cheaper one for ``tokens`` tokens a step.

    Case 1: a slice's input is rotated, and the weight is edited otherwise too: formed.
    Case 2: some function draws random numbers (dropout), or is gated: factored; formed is refused.
    Case 3: the weight has 16 bits and is added to: factored, as small updates would be rounded
    away. The fold looks at the weight itself too, as a plan may be attached to another type.
    Case 4: else by the time of FLOPs and bytes (``ir/work.py``). A formed weight has, in the
    backward pass, a whole weight gradient, which thin factors avoid.
    """

    tokens: int = 1024
    device: Device = DEVICES["cpu"]
    dtype: str = "float32"
    force: Form | None = None
    name: str = "choose lowering"

    def run(self, graph: AdapterGraph) -> str:
        modules: dict[str, list[tuple[int, WriteNode]]] = {}
        for address, write in graph.writes():
            on_weight = write.stage is not None and write.stage.on_weight
            if on_weight and write.stage is not Stage.WEIGHT_BASE:
                modules.setdefault(write.path, []).append((address, write))
        formed = 0
        known: dict[object, tuple[Form, str]] = {}
        for writes in modules.values():
            edits = [_priced(graph, address, write) for address, write in writes]
            key = tuple(_signature(edit) for edit in edits)
            if key not in known:  # layers are alike
                known[key] = self._choose(edits)
            form, why = known[key]
            formed += form is Form.FORMED
            for address, write in writes:
                graph.set(address, replace(write, form=form, why=why))
        where = f"{self.tokens:,} tokens in {self.dtype} on {self.device.name}"
        return f"{len(modules) - formed} modules factored, {formed} formed: {where}"

    def _choose(self, edits: list[Priced]) -> tuple[Form, str]:
        writes = [edit.write for edit in edits]
        must_form = [w for w in writes if w.must_form] if not turns_slices(writes) else []
        draws = [w for w in writes if w.gated or (w.algebra is not None and w.algebra.random)]
        if must_form and draws:
            what = "a gate" if draws[0].gated else "dropout"
            raise CompositionError(
                f"{draws[0].label}: {what} acts on the stream, but {must_form[0].label} needs "
                f"the weight to be formed here; leave out {what}"
            )
        if must_form:
            return Form.FORMED, "a slice's input is rotated, and its weight edited otherwise"
        if draws:
            what = "a gate" if draws[0].gated else "dropout"
            work, way = price_factored(edits, self.tokens, self.device)
            took = work.seconds(self.device, self.dtype) * 1e6
            return Form.FACTORED, f"{what} acts on the stream; factored ({way}) {took:,.0f} us"
        adds = any(w.stage is Stage.WEIGHT_ADD for w in writes)
        if self.force is not None:
            return self.force, "asked for"
        return self._cheaper(edits, narrow=adds and self.dtype in _NARROW)

    def _cheaper(self, edits: list[Priced], *, narrow: bool) -> tuple[Form, str]:
        work, way = price_factored(edits, self.tokens, self.device)
        factored = work.seconds(self.device, self.dtype) * 1e6
        formed = price_formed(edits, self.tokens).seconds(self.device, self.dtype) * 1e6
        way = f" ({way})" if way else ""
        if narrow:
            return Form.FACTORED, (
                f"16 bits would lose small updates of a formed weight; factored{way} "
                f"{factored:,.0f} us, formed {formed:,.0f} us"
            )
        if factored <= formed:
            return Form.FACTORED, f"factored{way} {factored:,.0f} us, formed {formed:,.0f} us"
        return Form.FORMED, f"formed {formed:,.0f} us, factored{way} {factored:,.0f} us"


def _priced(graph: AdapterGraph, address: int, write: WriteNode) -> Priced:
    operations = [node.primitive for _, node in graph.operations_of(address)]
    return Priced(write, chain_of(graph, address), operations)


def _signature(edit: Priced) -> tuple[object, ...]:
    """What the price of an edit depends on."""
    write, site = edit.write, edit.write.site
    links = tuple((op.name, repr(op.arguments), op.place) for op in edit.operations)
    return write.stage, write.gated, write.algebra, site.d_in, site.d_out, site.rows, links

