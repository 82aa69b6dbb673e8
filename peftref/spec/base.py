"""Base class of the frozen pydantic models at the border."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Frozen", "Scalar"]

Scalar = bool | int | float | str | None


class Frozen(BaseModel):
    """Immutable; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
