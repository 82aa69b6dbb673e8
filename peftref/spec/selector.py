"""Which places of a backbone a module is inserted at."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from peftref.spec.base import Frozen
from peftref.spec.typology import Port

__all__ = ["Positions", "SiteSelector", "StackName", "is_site_pattern", "layers_of"]

StackName = Literal["encoder", "decoder", "text", "vision", "first", "last"]

_NAME = r"[a-z0-9_*]+\??"
_PATH = rf"{_NAME}(?:\.{_NAME})*"
_PART = rf"(?:{_NAME}|\{{{_PATH}(?:,{_PATH})*\}}\??)"
_ROLES = re.compile(rf"{_PART}(?:\.{_PART})*")
_SLICE = re.compile(r"(?:-?\d+)?:(?:-?\d+)?(?::-?[1-9]\d*)?")


def is_site_pattern(text: str) -> bool:
    """Whether ``text`` is a role pattern or ``module:`` and a regular expression."""
    if not text.startswith("module:"):
        return _ROLES.fullmatch(text) is not None
    try:
        re.compile(text.removeprefix("module:"))
    except re.error:
        return False
    return True


def layers_of(value: object) -> str | tuple[int, ...] | None:
    """Return a choice of layers as ``"all"``, a slice or indices; None where it is none."""
    if isinstance(value, str):
        return value if value == "all" or _SLICE.fullmatch(value) else None
    if not isinstance(value, list | tuple):
        return None
    plain = [item for item in value if type(item) is int]
    return tuple(plain) if plain and len(plain) == len(value) else None


class Positions(Frozen):
    """The tokens of a sequence at which a module acts; at all others nothing changes.

    Padding does not count: ``first`` is the number of leading real tokens, ``last`` of trailing
    ones, ``special`` adds the special tokens of the tokenizer ([CLS], [SEP], ...). A token that
    is generated later is none of them: such a module acts while the input is read.
    """

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)
    special: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        return {"special": True} if value == "special" else value

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not (self.first or self.last or self.special):
            raise ValueError("positions select no token: set first, last or special")
        return self

    @property
    def key(self) -> str:
        """A name that is the same for equal positions: ``first3+last1``."""
        parts = [f"{name}{count}" for name, count in
                 (("first", self.first), ("last", self.last)) if count]
        return "+".join([*parts, *(["special"] if self.special else [])])


class SiteSelector(Frozen):
    """A pattern over site roles, or a raw pattern over module paths.

    ``select`` is a role pattern: names joined by dots, ``{a,b}`` alternatives, ``*`` inside or
    for a part, and a trailing ``?`` on a part or alternative that a backbone may lack
    (``"{attention,cross_attention?}.{key,value}"``). Every alternative without ``?`` must match.
    ``module`` is a regular expression that a dotted module path must match whole; a ``select``
    that starts with ``module:`` means it too, so that a parameter of type ``site`` reaches both.
    ``layers`` is ``"all"``, a list of indices (negative from the end) or a slice ``"0:6:2"``.
    ``stack`` is one by name, or the ``first`` or ``last`` of an encoder and a decoder.
    ``positions`` restricts the change to some tokens: ``{first: 3, last: 1}`` or ``special``.
    """

    select: str | None = None
    module: str | None = None
    port: Port = Port.OUTPUT
    layers: Literal["all"] | str | tuple[int, ...] = "all"
    stack: StackName | None = None
    positions: Positions | None = None

    @model_validator(mode="before")
    @classmethod
    def _raw_pattern(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        if isinstance(value, dict) and str(value.get("select", "")).startswith("module:"):
            rest = {key: item for key, item in value.items() if key != "select"}
            return {**rest, "module": value["select"].removeprefix("module:")}
        return value

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if (self.select is None) == (self.module is None):
            raise ValueError("a site needs exactly one of 'select' (roles) and 'module' (regex)")
        if self.select is not None and not is_site_pattern(self.select):
            raise ValueError(f"{self.select!r} is no site pattern: names joined by dots, with "
                             "{a,b}, * and ?, such as 'attention.{query,value}'")
        if self.module is not None and not is_site_pattern(f"module:{self.module}"):
            raise ValueError(f"{self.module!r} is no regular expression")
        if layers_of(self.layers) is None:
            raise ValueError(f"layers are 'all', a list of indices or a slice such as '0:6:2', "
                             f"not {self.layers!r}")
        return self
