"""One declared space of candidates, and its two encodings for samplers.

Each technique has a *level*: the index of its size (rank, bottleneck, length) among the values
that the spec lists, or -1 when it is off. The **flat** encoding gives every parameter always, as
a number where it is ordered: what a Gaussian process wants. The **conditional** encoding asks for
a technique's parameters only when ``use.<technique>`` is 1: what TPE wants. Both decode with the
same rule, and every point of either decodes to a valid candidate: with more than ``max_members``
techniques on, those with the largest relative level stay.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftref.errors import SearchError

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Candidate", "Dimension", "Encoding", "Option", "Space", "Value"]

Value = bool | int | float | str
Point = Mapping[str, Value]
Encoding = Literal["flat", "conditional"]

_OFF = -1
_RATE_STEP = 0.5  # in powers of two: finer differences are noise, and coarse ones repeat


@dataclass(frozen=True, slots=True)
class Dimension:
    """A searched parameter.

    Attributes:
        name: of the parameter.
        values: what a candidate may have, ascending where ordered.
        ordered: whether they are numbers.
        default: index of the value nearest to the spec's default.
        implied: the spec's default, which an expression need not write.
    """

    name: str
    values: tuple[Value, ...]
    ordered: bool
    default: int
    implied: Value | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """A technique of the space.

    ``size`` is the first ordered dimension, ``others`` the rest, ``fixed`` what all candidates
    share, ``layered`` whether the technique has a ``layers`` parameter.
    """

    name: str
    size: Dimension | None
    others: tuple[Dimension, ...] = ()
    fixed: tuple[tuple[str, Value], ...] = ()
    layered: bool = True

    @property
    def levels(self) -> int:
        """Number of sizes."""
        return len(self.size.values) if self.size is not None else 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A composition and its learning rate factor; ``expression`` None is the bare task head."""

    members: tuple[str, ...]
    expression: str | None
    rate: float

    @property
    def key(self) -> str:
        """Canonical hash: equal for candidates that would be the same training."""
        text = f"{self.expression}|{self.rate:.6g}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def kind(self) -> Literal["floor", "single", "hybrid"]:
        """How many techniques it has: none, one, several."""
        names: tuple[Literal["floor", "single", "hybrid"], ...] = ("floor", "single", "hybrid")
        return names[min(len(self.members), 2)]


@dataclass(frozen=True, slots=True)
class Space:
    """The candidates, as options, a shared choice of layers and a shared learning rate factor.

    ``layers`` are pairs of a name and what the selector calls it; ``rates`` is the range of the
    factor as powers of two.
    """

    options: tuple[Option, ...]
    layers: tuple[tuple[str, str], ...]
    rates: tuple[float, float]
    max_members: int

    def __post_init__(self) -> None:
        if not self.options:
            raise SearchError("The search space is empty: 'search.space.techniques' names none.")

    def suggest(self, trial: Trial, encoding: Encoding) -> Candidate:
        """Ask a sampler for a point and decode it."""
        point: dict[str, Value] = {}
        for option in self.options:
            if encoding == "conditional":
                used = trial.suggest_int(f"use.{option.name}", 0, 1)
                if not used:
                    continue
            low = 0 if encoding == "conditional" else _OFF
            point[option.name] = trial.suggest_int(option.name, low, option.levels - 1)
            for dim in option.others:
                name = f"{option.name}.{dim.name}"
                point[name] = _suggest_index(trial, name, dim)
        if len(self.layers) > 1:
            names = [name for name, _ in self.layers]
            point["layers"] = trial.suggest_categorical("layers", names)
        if self.rates[0] < self.rates[1]:
            point["rate"] = trial.suggest_float("rate", *self.rates, step=_RATE_STEP)
        return self.decode(point)

    def decode(self, point: Point) -> Candidate:
        """Return the candidate of a point in either encoding; total on the whole box."""
        levels = {option.name: int(point.get(option.name, _OFF)) for option in self.options}
        on = [option for option in self.options if levels[option.name] > _OFF]
        by_size = sorted(on, key=lambda o: -(levels[o.name] + 0.5) / o.levels)
        kept = set(by_size[: self.max_members])
        members = [option for option in self.options if option in kept]
        if not members:
            return self.floor
        layers = dict(self.layers)[str(point.get("layers", self.layers[0][0]))]
        texts = [_member(o, levels[o.name], layers, point) for o in members]
        rate = float(point.get("rate", self._middle_rate))
        return Candidate(tuple(o.name for o in members), " + ".join(texts), 2.0**rate)

    @property
    def floor(self) -> Candidate:
        """The frozen backbone with its task head."""
        return Candidate((), None, 1.0)

    def point(
        self, levels: Mapping[str, int], encoding: Encoding, choices: Point | None = None
    ) -> dict[str, Value]:
        """Return the point with these techniques on, and defaults where ``choices`` is silent."""
        chosen = choices or {}
        point: dict[str, Value] = {}
        for option in self.options:
            level = levels.get(option.name, _OFF)
            if encoding == "conditional":
                point[f"use.{option.name}"] = int(level > _OFF)
                if level == _OFF:
                    continue
            point[option.name] = level
            for dim in option.others:
                name = f"{option.name}.{dim.name}"
                point[name] = chosen.get(name, _coded(dim, dim.default))
        if len(self.layers) > 1:
            point["layers"] = chosen.get("layers", self.layers[0][0])
        if self.rates[0] < self.rates[1]:
            point["rate"] = chosen.get("rate", self._middle_rate)
        return point

    def baselines(self, encoding: Encoding, sizes: int) -> Iterator[dict[str, Value]]:
        """Yield the floor, then each technique alone: its usual size, then smallest, largest."""
        yield self.point({}, encoding)
        for turn in range(sizes):
            for option in self.options:
                usual = option.size.default if option.size is not None else 0
                order = list(dict.fromkeys([usual, 0, option.levels - 1]))
                if turn < len(order):
                    yield self.point({option.name: order[turn]}, encoding)

    def smallest(self) -> Iterator[Candidate]:
        """Yield each technique alone at its smallest size, for every choice of layers."""
        for option in self.options:
            for name, _ in self.layers:
                yield self.decode(self.point({option.name: 0}, "flat", {"layers": name}))

    def draw(self, random_: random.Random, encoding: Encoding) -> dict[str, Value]:
        """Return a random point whose number of members is uniform.

        Uniform points of the flat box almost all have ``max_members`` techniques.
        """
        count = random_.randint(min(2, self.most_members), self.most_members)
        picked = random_.sample(self.options, count)
        levels = {option.name: random_.randrange(option.levels) for option in picked}
        choices: dict[str, Value] = {"layers": random_.choice(self.layers)[0]}
        steps = round((self.rates[1] - self.rates[0]) / _RATE_STEP)
        choices["rate"] = self.rates[0] + _RATE_STEP * random_.randint(0, steps)
        for option in picked:
            for dim in option.others:
                index = random_.randrange(len(dim.values))
                choices[f"{option.name}.{dim.name}"] = _coded(dim, index)
        return self.point(levels, encoding, choices)

    @property
    def most_members(self) -> int:
        """Members of the largest candidate."""
        return min(self.max_members, len(self.options))

    @property
    def _middle_rate(self) -> float:
        """The middle of the range: baselines get it, as no technique is to win by its rate."""
        return self.rates[0] + _RATE_STEP * round((self.rates[1] - self.rates[0]) / 2 / _RATE_STEP)


def rate_exponents(low: float, high: float) -> tuple[float, float]:
    """Return the range of factors as multiples of the step in powers of two, inside it."""
    inside = math.ceil(math.log2(low) / _RATE_STEP - 1e-9), math.floor(
        math.log2(high) / _RATE_STEP + 1e-9
    )
    if inside[0] > inside[1]:
        raise SearchError(
            f"'search.space.learning_rate' {low}..{high} holds no factor of the grid 2^(k/2); "
            "valid: a range such as 0.25..4, or 1..1 for the cited rates only."
        )
    return inside[0] * _RATE_STEP, inside[1] * _RATE_STEP


def _suggest_index(trial: Trial, name: str, dim: Dimension) -> Value:
    if dim.ordered:
        return trial.suggest_int(name, 0, len(dim.values) - 1)
    return dim.values[dim.values.index(trial.suggest_categorical(name, dim.values))]


def _coded(dim: Dimension, index: int) -> Value:
    """Return how the encodings write a value: its index when ordered, else the value."""
    return index if dim.ordered else dim.values[index]


def _member(option: Option, level: int, layers: str, point: Point) -> str:
    """Return the expression of one member, with arguments in a fixed order."""
    arguments: dict[str, Value] = dict(option.fixed)
    if option.size is not None:
        arguments[option.size.name] = option.size.values[level]
    for dim in option.others:
        coded = point.get(f"{option.name}.{dim.name}", _coded(dim, dim.default))
        value = dim.values[int(coded)] if dim.ordered else coded
        if value != dim.implied:
            arguments[dim.name] = value
    if option.layered and layers != "all":
        arguments["layers"] = layers
    if not arguments:
        return option.name
    return f"{option.name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
