"""The plan: edits per backbone module, in order, with tensors named and sized.

Data only; computed without touching the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from peftref.backbone.site_table import SiteTable
from peftref.ir.cost import Cost
from peftref.ir.edits import ModulePlan
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import TensorSpec
from peftref.spec.composition import CompositionSpec
from peftref.spec.technique import ProcedureSpec

__all__ = ["Plan", "PlannedTensor", "Properties"]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did."""

    name: str
    summary: str
    nodes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the adapter under its full name; ``owner``: a module path, or "" for the root."""

    name: str
    spec: TensorSpec
    member: str
    owner: str


@dataclass(frozen=True, slots=True)
class Properties:
    """What holds for the whole composition, derived.

    Attributes:
        identity_at_init: the adapted model equals the backbone before the first step.
        mergeable: everything folds into weights and biases.
        blockers: why it does not.
        mixes_tokens: some edit of a row depends on other rows (no cached decoding).
        needs_token_mask: some gate must know the padding.
        needs_data: some procedure must see data before the first step.
        order_notes: ties that do not commute, and the order that is used.
    """

    identity_at_init: bool
    mergeable: bool
    blockers: tuple[str, ...]
    mixes_tokens: bool
    needs_token_mask: bool
    needs_data: bool
    order_notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What ``attach`` will do, and what holds for it.

    Attributes:
        composition: what was compiled.
        table: the backbone's sites.
        modules: edits by swapped module, in execution order.
        tensors: all tensors of the adapter, each once.
        procedures: what happens over training time.
        properties: derived properties.
        servable: target -> blockers; empty blockers: it can be served so.
        records: what each pass did.
        graph: the final graph.
    """

    composition: CompositionSpec
    table: SiteTable
    modules: tuple[ModulePlan, ...]
    tensors: tuple[PlannedTensor, ...]
    procedures: tuple[ProcedureSpec, ...]
    properties: Properties
    servable: Mapping[str, tuple[str, ...]]
    records: tuple[PassRecord, ...] = ()
    graph: AdapterGraph | None = field(default=None, compare=False, repr=False)

    @cached_property
    def trainable_parameters(self) -> int:
        """Number of trained numbers, each shared tensor once; task head not counted."""
        return sum(t.spec.size for t in self.tensors if t.spec.trainable)

    @cached_property
    def stored_parameters(self) -> int:
        """Numbers that an artifact stores: trained tensors and masks."""
        return sum(t.spec.size for t in self.tensors if t.spec.trainable or t.spec.buffer)

    @cached_property
    def trainable_share(self) -> float:
        """Trainable parameters over those of the backbone."""
        return self.trainable_parameters / max(self.table.frozen_parameters, 1)

    def cost(self, tokens: int = 1024, sequences: int = 1) -> Cost:
        """FLOPs and bytes that the adapter adds to a step of ``tokens`` tokens in ``sequences``."""
        return Cost.of(self.modules, self.table, self.trainable_parameters, tokens, sequences)

    def __str__(self) -> str:
        lines = [f"{self.composition.composition} on {self.table.family}: "
                 f"{self.trainable_parameters:,} trainable parameters "
                 f"({self.trainable_share:.3%} of {self.table.frozen_parameters:,})"]
        for module in self.modules:
            for edit in module.edits:
                size = sum(t.spec.size for t in self.tensors if t.name in edit.tensors)
                form = "" if edit.write.form is None else f", {edit.write.form.name.lower()}"
                lines.append(f"  {edit.write.label}: {edit.stage.name.lower()}{form}, {size:,}")
        p = self.properties
        lines.append(f"identity at init: {'yes' if p.identity_at_init else 'no'}; "
                     f"mergeable: {'yes' if p.mergeable else 'no'}")
        lines.extend(f"order: {note}" for note in p.order_notes)
        return "\n".join(lines)
