"""The closed value lists of the typology (PEFT-Ref, Sabry and Belz 2023, arXiv 2304.12410)."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["InsertionForm", "IntegrationKind", "Port", "Workspace"]


class Workspace(StrEnum):
    """The part of the backbone that a module reads and writes."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    CROSS_ATTENTION = "cross_attention"
    FFN = "ffn"
    NORM = "norm"
    BLOCK = "block"
    HEAD = "head"


class Port(StrEnum):
    """A tensor of a site that can be read or written.

    ``hidden_states``: what all layers of a stack gave, its input first; ``both``: input and output
    side by side. These two are read only.
    """

    INPUT = "input"
    OUTPUT = "output"
    WEIGHT = "weight"
    BIAS = "bias"
    KEYS_VALUES = "keys_values"
    HIDDEN_STATES = "hidden_states"
    BOTH = "both"


class InsertionForm(StrEnum):
    """Where a module sits: after the component it changes, or beside it."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"


class IntegrationKind(StrEnum):
    """How a module's output joins the stream."""

    ADD = "add"
    SCALED_ADD = "scaled_add"
    GATED_ADD = "gated_add"
    RESCALE = "rescale"
    CONCAT = "concat"
    ROTATE = "rotate"
    REPLACE = "replace"
