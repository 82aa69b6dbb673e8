"""A technique as data: sites, functions over them, and how the results join."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, JsonValue, model_serializer, model_validator

from peftref.errors import Mark
from peftref.spec.base import Frozen, Scalar
from peftref.spec.parameter import Parameter, ParameterValue
from peftref.spec.selector import SiteSelector
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = [
    "COMBINATORS",
    "Expression",
    "Integration",
    "Interaction",
    "LearningRate",
    "ModuleSpec",
    "OptimiserGroup",
    "Parameter",
    "ProcedureSpec",
    "Reference",
    "TechniqueSpec",
]


COMBINATORS = ("chain", "sum", "product", "since_start")


class Reference(Frozen):
    """The source of a technique."""

    paper: str
    url: str


class Expression(Frozen):
    """A function as an expression tree: a primitive, macro or combinator by name.

    Written in YAML as ``name``, ``{name: {argument: value}}`` or ``{combinator: [children]}``; a
    list is a ``chain``.
    """

    name: str
    arguments: Mapping[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    children: tuple[Expression, ...] = ()
    mark: Mark | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, list | tuple):
            return {"name": "chain", "children": list(value)}
        if isinstance(value, dict) and "name" not in value and len(value) == 1:
            (name, body), = value.items()
            if isinstance(body, list | tuple):
                return {"name": name, "children": list(body)}
            if body is None:
                return {"name": name}
            if isinstance(body, dict):
                return {"name": name, "arguments": dict(body)}
            raise ValueError(f"{name!r} takes a mapping of arguments or a list, not {body!r}")
        return value

    @model_validator(mode="after")
    def _children_belong_to_combinators(self) -> Self:
        if self.name in COMBINATORS:
            if not self.children or self.arguments:
                raise ValueError(f"{self.name!r} takes a list of at least one function")
        elif self.children:
            known = ", ".join(COMBINATORS)
            raise ValueError(f"{self.name!r} takes arguments; only {known} take a list")
        return self

    @model_serializer
    def _to_yaml(self) -> Any:  # noqa: ANN401 - the loader's border
        if self.children:
            return {self.name: [child.model_dump() for child in self.children]}
        if self.arguments:
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.arguments.items()}
            return {self.name: plain}
        return self.name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expression):
            return NotImplemented
        mine = (self.name, dict(self.arguments), self.children)
        return mine == (other.name, dict(other.arguments), other.children)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # arguments are a mapping


class Integration(Frozen):
    """How the function's output joins the stream; ``scale`` belongs to ``scaled_add``."""

    kind: IntegrationKind
    scale: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _scale_is_honoured(self) -> Self:
        if (self.scale is not None) != (self.kind is IntegrationKind.SCALED_ADD):
            raise ValueError("'scale' goes with kind 'scaled_add', and only with it")
        return self


class Interaction(Frozen):
    """Insertion form x integration form."""

    insertion: InsertionForm
    integration: Integration


class ModuleSpec(Frozen):
    """One site x function x interaction.

    ``read`` overrides the port that the function reads: by default a sequential module reads
    the port it writes and a parallel one the site's input. A module that writes ``input`` and
    reads ``output`` sees the site's own frozen function of the stream (Pfeiffer adapter).
    ``optional`` allows no insertion at all on backbones that lack the site.
    ``after`` names modules (``member.module``) whose edits of the same tensor come first.
    """

    name: str
    site: SiteSelector
    read: Port | None = None
    function: Expression
    interaction: Interaction
    optional: bool = False
    after: tuple[str, ...] = ()


class OptimiserGroup(Frozen):
    """Trainable tensors whose path matches ``match`` (glob) train at ``ratio`` x the rate."""

    match: str
    ratio: float = 1.0
    weight_decay: float | None = None


class LearningRate(Frozen):
    """The cited default learning rate of a technique."""

    default: float
    source: str
    range: tuple[float, float] | None = None


class ProcedureSpec(Frozen):
    """What happens over training time, by registered name.

    Written ``name``, ``{name: {argument: value}}``, or ``{name: [...]}`` where the procedure has
    an argument of its own name.
    """

    name: str
    arguments: Mapping[str, JsonValue] = Field(default_factory=dict)
    mark: Mark | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value and len(value) == 1:
            (name, body), = value.items()
            body = {name: list(body)} if isinstance(body, list | tuple) else dict(body or {})
            return {"name": name, "arguments": body}
        return value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcedureSpec):
            return NotImplemented
        return (self.name, dict(self.arguments)) == (other.name, dict(other.arguments))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # arguments are a mapping


class TechniqueSpec(Frozen):
    """A technique with all its parameters set: what the compiler reads."""

    technique: str
    reference: Reference | None = None
    values: Mapping[str, ParameterValue] = Field(default_factory=dict)
    learning_rate: LearningRate | None = None
    optimiser_groups: tuple[OptimiserGroup, ...] = ()
    modules: tuple[ModuleSpec, ...] = Field(min_length=1)
    procedures: tuple[ProcedureSpec, ...] = ()
