"""What was found out about a model that no row describes, and the row that it makes.

The row is written as YAML first and read back like any other: what is printed, saved, corrected
by a user and used here is the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from peftref.backbone.family import Family
from peftref.spec.loader import parse_yaml, validated

__all__ = ["Finding", "Findings", "Section", "StackFindings"]

Section = Literal["before", "layer", "after"]
SECTIONS: tuple[Section, ...] = ("before", "layer", "after")


@dataclass(frozen=True, slots=True)
class Finding:
    """The place of one role, or of several in one fused projection.

    Attributes:
        role: as a row writes it: ``attention.query``, ``attention.{query,key,value}``.
        module: path below the layer, or below the base model outside the layers.
        why: how it is known, as a clause.
        settings: other fields of the place: ``rows``, ``input``, ``interface``.
    """

    role: str
    module: str
    why: str
    settings: Mapping[str, object] = field(default_factory=dict[str, object])

    def line(self) -> str:
        """Return the entry of a row, with the reason as a comment."""
        key = f'"{self.role}"' if "{" in self.role else self.role
        place = self.module
        if self.settings:
            fields = ", ".join(f"{name}: {_flow(value)}" for name, value in self.settings.items())
            place = f"{{module: {self.module}, {fields}}}"
        return f"{key}: {place}  # {self.why}"


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        entries: Mapping[str, object] = value  # pyright: ignore[reportUnknownVariableType]
        return "{" + ", ".join(f"{name}: {_flow(each)}" for name, each in entries.items()) + "}"
    return '""' if value == "" else str(value)


@dataclass(slots=True)
class StackFindings:
    """One stack: where its layers are, and its roles by section."""

    layers: str
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    sections: dict[Section, tuple[Finding, ...]] = field(
        default_factory=dict[Section, tuple[Finding, ...]])


@dataclass(slots=True)
class Findings:
    """All that was found.

    Attributes:
        model_type: of the configuration.
        norms: ``pre`` or ``post``.
        causal: by stack, whether a token sees only those before it.
        stacks: by name.
        doubts: why it is not certain, as sentences; empty: every role was shown by a trial.
        unplaced: modules without a role.
    """

    model_type: str
    norms: str = "pre"
    causal: dict[str, bool] = field(default_factory=dict[str, bool])
    stacks: dict[str, StackFindings] = field(default_factory=dict[str, StackFindings])
    doubts: list[str] = field(default_factory=list[str])
    unplaced: Sequence[str] = ()

    @property
    def certain(self) -> bool:
        """Whether the row may be used without being looked at."""
        return not self.doubts and bool(self.stacks)

    def row(self) -> Family:
        """Return the row.

        Raises:
            SpecError: what was found is no row.
        """
        return validated(Family, parse_yaml(self.text(), f"{self.model_type} (inferred)"))

    def text(self) -> str:
        """Return the row as YAML; doubts and modules without a role are comments."""
        state = ("Inferred: every role was shown by a trial on a small random model of this class."
                 if self.certain else "Draft: NOT certain. Correct it, then give it with --sites.")
        lines = [f"# {state}", *(f"# doubt: {doubt}" for doubt in self.doubts)]
        lines += [f"# module without a role: {path}" for path in self.unplaced]
        lines += [f"families: [{self.model_type}]", f"norms: {self.norms}", "stacks:"]
        for name, stack in self.stacks.items():
            lines += [f"  {name}:", f"    layers: {stack.layers}"]
            lines += [f"    {key}: {value}" for key, value in stack.settings.items()]
            for section in SECTIONS:
                found = stack.sections.get(section, ())
                if found or section == "layer":
                    lines.append(f"    {section}:" + ("" if found else " {}"))
                    lines += [f"      {finding.line()}" for finding in found]
        return "\n".join(lines) + "\n"
