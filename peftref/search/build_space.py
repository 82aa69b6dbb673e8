"""From the declared techniques to a space: the specs' typed parameters are the only source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peftref.errors import SearchError, SpecError, unknown_name
from peftref.search.settings import Choice, SpaceSettings
from peftref.search.space import Dimension, Option, Space, Value, rate_exponents
from peftref.spec import load, parameters
from peftref.spec.parameter import Parameter

__all__ = ["build_space"]

_POINTS = 5  # of a range that lists no values and is not powers of two


def build_space(settings: SpaceSettings, layers: int) -> Space:
    """Return the space for a backbone with ``layers`` layers.

    Raises:
        SearchError: it is empty, names a technique twice, or a parameter cannot be searched.
        SpecError: a technique or value is unknown.
    """
    names = [choice.use for choice in settings.techniques]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SearchError(f"'search.space.techniques' names {twice[0]!r} twice; give it once.")
    named = [(name, _layers(name, layers)) for name in dict.fromkeys(settings.layers)]
    return Space(
        tuple(_option(choice) for choice in settings.techniques),
        tuple({selector: (name, selector) for name, selector in named}.values()),
        rate_exponents(*settings.learning_rate),
        settings.max_members,
    )


def _layers(name: str, count: int) -> str:
    """Return what a selector calls the named part of the layers; a selector stays as it is."""
    named = {
        "all": "all",
        "lower": f"0:{math.ceil(count / 2)}",
        "upper": f"{count // 2}:{count}",
        "alternate": f"1:{count}:2",
    }
    return named.get(name, name)


def _option(choice: Choice) -> Option:
    known = parameters(choice.use)
    for name in [*choice.fixed, *(choice.vary or {})]:
        if name not in known:
            raise SearchError(unknown_name(f"parameter of {choice.use}", name, known))
    load(choice.use, **choice.fixed)
    varied = _varied(choice, known)
    found = [_dimension(choice, name, known[name], values) for name, values in varied]
    dimensions = [dim for dim in found if len(dim.values) > 1]
    size = next((dim for dim in dimensions if dim.ordered), None)
    return Option(
        name=choice.use,
        size=size,
        others=tuple(dim for dim in dimensions if dim is not size),
        fixed=tuple((name, value) for name, value in choice.fixed.items() if value is not None),
        layered="layers" in known and "layers" not in choice.fixed,
    )


def _varied(
    choice: Choice, known: Mapping[str, Parameter]
) -> list[tuple[str, Sequence[Value] | None]]:
    """Return the names to search, each with the values that the run file narrows it to."""
    if choice.vary is not None:
        return [(name, _plain(values)) for name, values in choice.vary.items()]
    marked = [name for name, parameter in known.items() if parameter.search is not None]
    return [(name, None) for name in marked if name not in choice.fixed]


def _plain(values: Sequence[Value | None] | None) -> list[Value] | None:
    return None if values is None else [value for value in values if value is not None]


def _dimension(
    choice: Choice, name: str, parameter: Parameter, narrowed: Sequence[Value] | None
) -> Dimension:
    values = list(narrowed) if narrowed is not None else _values(choice.use, name, parameter)
    kept: list[Value] = []
    for value in dict.fromkeys(values):
        try:
            load(choice.use, **{**choice.fixed, name: value})
        except SpecError as error:
            # Without a list of its own the search proposes only what has an effect here; a
            # value that somebody wrote down must work.
            if narrowed is not None or "no effect" not in str(error):
                raise
            continue
        kept.append(value)
    ordered = parameter.type in ("int", "float")
    if ordered:
        kept.sort(key=float)
    usual = parameter.default
    implied = usual if isinstance(usual, bool | int | float | str) else None
    nearest = _nearest(kept, usual, ordered=ordered)
    return Dimension(name, tuple(kept), ordered, nearest, implied)


def _values(use: str, name: str, parameter: Parameter) -> list[Value]:
    """Return the values that the spec gives a search: its list, its choices or its range."""
    listed = parameter.search or parameter.choices
    if listed is not None:
        return [value for value in listed if value is not None]
    if parameter.type == "bool":
        return [False, True]
    if parameter.range is None:
        raise SearchError(
            f"Parameter {name!r} of {use} has no 'search' values, choices or range; list the "
            f"values: vary: {{{name}: [...]}}."
        )
    low, high = parameter.range
    if parameter.type == "int" and parameter.log:
        exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2**exponent for exponent in exponents]
    parts = [step / (_POINTS - 1) for step in range(_POINTS)]
    if parameter.log:
        return [low * (high / low) ** part for part in parts]
    points = [low + (high - low) * part for part in parts]
    return [round(point) for point in points] if parameter.type == "int" else list(points)


def _nearest(values: Sequence[Value], default: object, *, ordered: bool) -> int:
    if default in values:
        return [*values].index(default)  # pyright: ignore[reportArgumentType]
    if ordered and values and isinstance(default, int | float):
        return min(range(len(values)), key=lambda i: abs(float(values[i]) - default))
    return 0
