"""Techniques together as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from peftref.errors import Mark
from peftref.spec.base import Frozen, Scalar
from peftref.spec.parameter import ParameterValue
from peftref.spec.technique import LearningRate, ProcedureSpec, Reference, TechniqueSpec

__all__ = ["CompositionFile", "CompositionSpec", "CouplingSpec", "Member", "MemberUse"]


class Member(Frozen):
    """A technique under the name that the composition gives it."""

    name: str
    technique: TechniqueSpec


class CouplingSpec(Frozen):
    """A relation between members, by registered name: mix, prune, gate, share, ...

    ``members`` empty means all members. Written ``{mix: {members: [a], copies: 4}}``.
    """

    name: str
    members: tuple[str, ...] = ()
    arguments: Mapping[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    mark: Mark | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value and len(value) == 1:
            (name, body), = value.items()
            body = dict(body or {})
            return {"name": name, "members": body.pop("members", ()), "arguments": body}
        return value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CouplingSpec):
            return NotImplemented
        mine = (self.name, self.members, dict(self.arguments))
        return mine == (other.name, other.members, dict(other.arguments))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # arguments are a mapping


class MemberUse(Frozen):
    """A member as a composition file names it: ``use`` is a name, a path or an expression.

    ``name`` is by default that of the technique; ``with`` sets parameters of what is used.
    """

    use: str
    name: str | None = None
    with_: Mapping[str, Scalar | tuple[int, ...]] = Field(default_factory=dict, alias="with")


class CompositionFile(Frozen):
    """A composition file whose parameters have values; its members are still to be read.

    ``learning_rate`` replaces the cited rates of the members.
    """

    composition: str
    reference: Reference | None = None
    values: Mapping[str, ParameterValue] = Field(default_factory=dict)
    learning_rate: LearningRate | None = None
    members: tuple[MemberUse, ...] = Field(min_length=1)
    couplings: tuple[CouplingSpec, ...] = ()
    procedures: tuple[ProcedureSpec, ...] = ()


class CompositionSpec(Frozen):
    """All that the compiler needs to know: members, couplings and procedures, in order."""

    composition: str
    reference: Reference | None = None
    values: Mapping[str, ParameterValue] = Field(default_factory=dict)
    members: tuple[Member, ...] = Field(min_length=1)
    couplings: tuple[CouplingSpec, ...] = ()
    procedures: tuple[ProcedureSpec, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> Self:
        names = [member.name for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two members share the name {twice[0]!r}")
        for coupling in self.couplings:
            for name in coupling.members:
                if name not in names:
                    known = ", ".join(names)
                    raise ValueError(f"{coupling.name} names member {name!r}; members: {known}")
        return self

    @classmethod
    def of(cls, technique: TechniqueSpec) -> CompositionSpec:
        """Return the composition of one technique."""
        member = Member(name=technique.technique, technique=technique)
        return cls(composition=technique.technique, reference=technique.reference,
                   values=technique.values, members=(member,))
