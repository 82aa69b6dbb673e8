"""Hypothesis strategies of random compositions from the catalogue.

    @given(compositions(site_table(model)))
    def test_mine(example):
        plan = compile_table(example.spec, table)

A failing example prints as YAML that ``peftref.load`` reads back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from hypothesis import assume
from hypothesis import strategies as st

from peftref.backbone.site_table import SiteTable
from peftref.compiler import compile_table
from peftref.errors import PeftRefError
from peftref.spec import load, parameters, to_yaml
from peftref.spec.catalogue import entries
from peftref.spec.composition import CompositionSpec
from peftref.spec.expression import Coupled, Term, Use, format_expression
from peftref.spec.parameter import Parameter, ParameterValue

__all__ = ["Composed", "Printer", "compositions", "techniques"]

COUPLINGS = ("gate", "mix", "prune", "share")
INITIALISERS = ("normal(0.02)", "normal(0.5)", "uniform(0.3)", "truncated_normal(0.1)",
                "xavier_uniform", "kaiming_uniform")


class Printer(Protocol):
    """What Hypothesis prints a failing example with."""

    def text(self, text: str) -> None:
        """Print text as it is."""
        ...


@dataclass(frozen=True, repr=False)
class Composed:
    """A drawn composition; its ``repr`` is the expression, then the YAML."""

    expression: str
    spec: CompositionSpec

    def __repr__(self) -> str:
        return f"# {self.expression}\n{to_yaml(self.spec)}"

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:
        printer.text(repr(self))


@dataclass(frozen=True)
class _Setting:
    """What to draw for.

    Attributes:
        table: sites of the backbone.
        largest: upper end of integers (ranks, widths, lengths), so that examples stay small.
        dropout: whether parameters that start at zero (dropout) may leave it.
    """

    table: SiteTable = field(repr=False)
    largest: int
    dropout: bool

    def accepts(self, expression: str) -> bool:
        """Whether the compiler takes an expression for the table."""
        return _accepts(_Key(self.table), expression)


class _Key:
    """A table as a key: by identity, held so that it stays alive."""

    def __init__(self, table: SiteTable) -> None:
        self.table = table

    def __hash__(self) -> int:
        return id(self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.table is self.table


@functools.lru_cache(maxsize=10_000)
def _accepts(key: _Key, expression: str) -> bool:
    try:
        compile_table(load(expression), key.table)
    except PeftRefError:
        return False
    return True


def compositions(
    table: SiteTable,
    *,
    names: Iterable[str] | None = None,
    members: int = 3,
    couplings: Iterable[str] = COUPLINGS,
    largest: int = 8,
    dropout: bool = False,
) -> st.SearchStrategy[Composed]:
    """Return a strategy of compositions that the compiler accepts for ``table``.

    Args:
        table: sites of the backbone.
        names: techniques and compositions to draw from; None: all of the catalogue that fit.
        members: largest number of members.
        couplings: those that may be put around members.
        largest: upper end of integers, so that examples stay small.
        dropout: whether dropout may be on.
    """
    setting = _Setting(table, largest, dropout)
    known = (*entries("technique"), *entries("composition"))
    fitting = [name for name in names or known if setting.accepts(name)]
    return _compositions(setting, tuple(fitting), members, tuple(couplings))


@st.composite
def _compositions(
    draw: st.DrawFn,
    setting: _Setting,
    names: tuple[str, ...],
    members: int,
    couplings: tuple[str, ...],
) -> Composed:
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=members))
    terms: list[Term] = []
    for name in chosen:
        use = draw(techniques(setting, name))
        terms.append(draw(_coupled(setting, use, couplings)) if couplings else use)
    if "gate" in couplings and len(terms) > 1 and draw(st.integers(0, 4)) == 0:
        gated = Coupled("gate", tuple(terms), {})
        terms = [gated] if setting.accepts(format_expression((gated,))) else terms
    expression = format_expression(tuple(terms))
    assume(setting.accepts(expression))
    return Composed(expression, load(expression))


@st.composite
def techniques(draw: st.DrawFn, setting: _Setting, name: str) -> Use:
    """Draw values for some parameters of a technique; those that it refuses stay at default."""
    values: dict[str, ParameterValue] = {}
    for key, parameter in parameters(name).items():
        values[key] = draw(_value(setting, name, key, parameter))
        try:
            load(name, **values)
        except PeftRefError:  # it has no effect in the branch that is chosen
            del values[key]
    use = Use(name, values)
    # A value that does not fit the widths, such as a block that divides none of them.
    assume(setting.accepts(format_expression((use,))))
    return use


@st.composite
def _coupled(draw: st.DrawFn, setting: _Setting, use: Use, couplings: tuple[str, ...]) -> Term:
    """Put at most one coupling around a member, where the compiler takes it."""
    kind = draw(st.sampled_from(("none", "none", *couplings)))
    arguments: dict[str, ParameterValue | tuple[str, ...]] = {}
    if kind == "mix":
        arguments = {"copies": draw(st.integers(2, 3))}
    elif kind == "prune":
        criterion = draw(st.sampled_from(("magnitude", "random", "er")))
        # All tensors under one threshold: one that is zero at first would be cut whole.
        scope = "local" if criterion == "magnitude" else draw(st.sampled_from(("local", "global")))
        keep = draw(st.sampled_from((0.25, 0.5, 0.9)))
        arguments = {"criterion": criterion, "scope": scope, "keep": keep}
    elif kind == "share":
        arguments = {"by": draw(st.sampled_from(("role", "all")))}
    if kind == "none":
        return use
    coupled = Coupled(kind, (use,), arguments)
    return coupled if setting.accepts(format_expression((coupled,))) else use


@st.composite
def _value(
    draw: st.DrawFn, setting: _Setting, name: str, key: str, parameter: Parameter
) -> ParameterValue:
    low, high = parameter.range or (-math.inf, math.inf)
    match parameter.type:
        case "int":
            top = max(int(low), min(int(min(high, 2**31)), setting.largest))
            powers = [2**i for i in range(12) if max(low, 2) <= 2**i <= top] or [int(low)]
            return draw(st.sampled_from(powers) | st.integers(int(low), top))
        case "float" if parameter.default == 0 and not setting.dropout:
            return parameter.default
        case "float":
            middle = float(parameter.default or 0.1)  # pyright: ignore[reportArgumentType]
            steps = [middle / 4, middle, 2 * middle]
            return draw(st.sampled_from([min(max(step, low), high) for step in steps]))
        case "bool":
            return draw(st.booleans())
        case "choice":
            return draw(st.sampled_from(parameter.choices or (parameter.default,)))
        case "text" if "initialiser" in parameter.doc:
            return draw(st.sampled_from((*INITIALISERS, str(parameter.default))))
        case "site":
            return draw(_sites(setting, name, key, str(parameter.default)))
        case "layers":
            return draw(_layers(min(setting.table.layers.values(), default=1)))
        case _:
            return parameter.default


@st.composite
def _sites(draw: st.DrawFn, setting: _Setting, name: str, key: str, default: str) -> str:
    """Draw a set of roles, each of which the technique accepts alone."""
    roles = [
        role
        for role in setting.table.roles()
        if setting.accepts(format_expression((Use(name, {key: role}),)))
    ]
    if not roles or draw(st.booleans()):
        return default
    chosen = draw(st.lists(st.sampled_from(roles), min_size=1, max_size=3, unique=True))
    return chosen[0] if len(chosen) == 1 else "{" + ",".join(chosen) + "}"


def _layers(count: int) -> st.SearchStrategy[ParameterValue]:
    some = st.lists(st.integers(-count, count - 1), min_size=1, max_size=count, unique=True)
    slices = st.integers(0, count - 1).map(lambda start: f"{start}:")
    return st.just("all") | some.map(tuple) | slices
