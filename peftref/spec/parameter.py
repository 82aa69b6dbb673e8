"""A typed parameter of a spec: its type, its range, and the check of a value."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from peftref.spec.base import Frozen, Scalar
from peftref.spec.selector import is_site_pattern, layers_of

__all__ = ["Parameter", "ParameterValue"]

ParameterValue = Scalar | tuple[int, ...]

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "text": "text",
    "site": "a site pattern such as 'attention.{query,value}'",
    "layers": "'all', a list of layer indices or a slice such as '0:6:2'",
    "technique": "a technique as text, such as 'lora(rank=8)'",
}


class Parameter(Frozen):
    """A typed parameter of a spec: the only source for Python, ``--set``, search and docs.

    ``range`` is inclusive; ``log`` marks a logarithmic scale for search; ``choices`` closes a
    ``choice``; ``peft`` is the name that huggingface/peft gives it; ``search`` narrows what a
    search proposes (a list of values), else ``range`` or ``choices`` is used.
    """

    type: Literal["int", "float", "bool", "choice", "text", "site", "layers", "technique"]
    default: ParameterValue
    range: tuple[float, float] | None = None
    log: bool = False
    choices: tuple[Scalar, ...] | None = None
    search: tuple[Scalar, ...] | None = None
    peft: str | None = None
    doc: str = ""

    @model_validator(mode="after")
    def _every_field_has_an_effect(self) -> Self:
        numeric = self.type in ("int", "float")
        if self.range is not None and not numeric:
            raise ValueError(f"'range' goes with type int or float, not {self.type}")
        if self.range is not None and not self.range[0] <= self.range[1]:
            raise ValueError(f"'range' is [lowest, highest], not {list(self.range)}")
        if self.log and (self.range is None or self.range[0] <= 0):
            raise ValueError("'log' needs a 'range' of positive numbers")
        if (self.choices is not None) != (self.type == "choice"):
            raise ValueError("'choices' goes with type 'choice', and only with it")
        proposals = [("search", value) for value in self.search or ()]
        for place, value in [("default", self.default), *proposals]:
            try:
                self.checked(value)
            except ValueError as error:
                raise ValueError(f"{place!r} {error}") from error
        return self

    def checked(self, value: object) -> ParameterValue:
        """Return ``value`` in the parameter's own type.

        Raises:
            ValueError: wrong type, out of range or not a choice; says what would be valid.
        """
        if value is None and self.default is None:
            return None
        if self.type == "choice":
            return self._choice(value)
        found = self._typed(value)
        if found is None:
            raise ValueError(f"must be {_KINDS[self.type]}, not {value!r:.60}")
        if self.range is not None and isinstance(found, int | float):
            low, high = self.range
            if not low <= found <= high:
                raise ValueError(f"must be from {low:g} to {high:g}, not {found!r}")
        return found

    def _choice(self, value: object) -> Scalar:
        for choice in self.choices or ():
            if type(choice) is type(value) and choice == value:
                return choice
        valid = ", ".join(str(choice) for choice in self.choices or ())
        raise ValueError(f"must be one of {valid}; not {value!r:.60}")

    def _typed(self, value: object) -> ParameterValue:
        """Return the value as the parameter's type, None where it is not of it."""
        match self.type, value:
            case "bool", bool():
                return value
            case _, bool():
                return None
            case "int", int():
                return value
            case "float", int() | float() if math.isfinite(value):
                return float(value)
            case "layers", list() | tuple() | str():
                return layers_of(value)
            case "site", str():
                return value if is_site_pattern(value) else None
            case "technique", str() if value.strip():
                return value
            case "text", str():
                return value
            case _:
                return None
