"""Which places of a backbone a module is inserted at."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from peftref.spec.base import Frozen
from peftref.spec.typology import Port

__all__ = ["SiteSelector"]


class SiteSelector(Frozen):
    """A pattern over site roles, or a raw pattern over module paths.

    ``select`` is a role pattern: names joined by dots, ``{a,b}`` alternatives, ``*`` inside or
    for a part, and a trailing ``?`` on a part or alternative that a backbone may lack
    (``"{attention,cross_attention?}.{key,value}"``). Every alternative without ``?`` must match.
    ``module`` is a regular expression that a dotted module path must match whole.
    ``layers`` is ``"all"``, a list of indices (negative from the end) or a slice ``"0:6:2"``.
    """

    select: str | None = None
    module: str | None = None
    port: Port = Port.OUTPUT
    layers: Literal["all"] | str | tuple[int, ...] = "all"
    stack: Literal["encoder", "decoder"] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> SiteSelector:
        if (self.select is None) == (self.module is None):
            raise ValueError("a site needs exactly one of 'select' (roles) and 'module' (regex)")
        return self
