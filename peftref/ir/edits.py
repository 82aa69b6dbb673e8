"""Edits of one module, in the order of the fold, with the programs that compute them."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.backbone.site_table import SiteKind
from peftref.ir.primitive import Primitive
from peftref.ir.types import Form, Stage, WriteNode

__all__ = ["EditPlan", "ModulePlan", "Program", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a flat program; ``inputs`` are registers."""

    primitive: Primitive  # pyright: ignore[reportMissingTypeArgument,reportUnknownVariableType]
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """Registers: 0 is the stream read, then the tensors, then the results of the steps."""

    tensors: tuple[str, ...]
    steps: tuple[Step, ...]
    result: int


@dataclass(frozen=True, slots=True)
class EditPlan:
    """One edit: where it stands in the fold and the program that computes it.

    ``gate`` computes what scales the change, ``y + g (edit(y) - y)``; None: nothing does.
    """

    write: WriteNode
    program: Program
    gate: Program | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of the function, then of the gate."""
        return self.program.tensors + (self.gate.tensors if self.gate is not None else ())

    @property
    def flops(self) -> int:
        """Multiply-adds times two of the activation form, per token, forward."""
        steps = self.program.steps + (self.gate.steps if self.gate is not None else ())
        return sum(step.primitive.flops() for step in steps)

    @property
    def stage(self) -> Stage:
        """Place in the fold."""
        if self.write.stage is None:
            raise TypeError("the stage is derived before a plan is made")
        return self.write.stage

    @property
    def formed(self) -> bool:
        """Whether the effective weight is formed."""
        return self.write.form is Form.FORMED

    @property
    def mergeable(self) -> bool:
        """Whether it is a map that a weight or bias can hold."""
        algebra = self.write.algebra
        if algebra is None or not algebra.matrix or self.gate is not None:
            return False
        if self.stage.on_weight or self.stage is Stage.BIAS:
            return True
        on_linear = self.write.site.kind is SiteKind.LINEAR
        scales = self.stage in (Stage.INPUT, Stage.OUTPUT) and algebra.linear
        # What a map adds to every output goes into the bias, where there is one.
        shifts = algebra.affine and self.write.site.bias
        scales = scales or (self.stage is Stage.OUTPUT and shifts)
        own_stream = self.write.read is self.write.port
        whole = self.write.site.rows is None or self.stage is Stage.OUTPUT
        return on_linear and scales and own_stream and whole


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """All edits of one swapped module, in the order of the fold."""

    path: str
    edits: tuple[EditPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def blockers(self) -> tuple[str, ...]:
        """Why the module cannot be merged as a whole; empty when it can."""
        reasons: list[str] = []
        for edit in self.edits:
            if not edit.mergeable and not edit.write.aside:
                reasons.append(f"{edit.write.label}: {_why(edit)}")
        return tuple(reasons)


def _why(edit: EditPlan) -> str:
    algebra = edit.write.algebra
    if edit.stage in (Stage.KEYS_VALUES, Stage.TOKENS):
        return "adds rows to a sequence, which no weight can hold"
    if edit.stage is Stage.STREAMS:
        return "makes its layer run on two streams"
    if edit.write.positions is not None:
        return f"acts at some positions only ({edit.write.positions.key})"
    if algebra is not None and algebra.per_sample:
        return "depends on the sample (a gate)"
    if algebra is not None and not algebra.linear:
        return "is not linear"
    if edit.write.site.kind is not SiteKind.LINEAR:
        return f"acts on a {edit.write.site.kind.value}, not on a linear module"
    return "has no matrix form at this port"
