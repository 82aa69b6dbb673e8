"""What a coupling is: a rewrite of the members it names, whatever their technique."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from peftref.ir.graph import AdapterGraph
from peftref.spec.base import Frozen

__all__ = ["Coupling", "CouplingArguments"]


class CouplingArguments(Frozen):
    """Arguments of a coupling, from YAML."""


A = TypeVar("A", bound=CouplingArguments)


class Coupling(ABC, Generic[A]):
    """Base of all couplings; registered under ``name``."""

    name: ClassVar[str]
    Arguments: ClassVar[type[CouplingArguments]] = CouplingArguments

    def __init__(self, arguments: A) -> None:
        self.arguments = arguments

    @abstractmethod
    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        """Rewrite the members in place; return one line that says what was done."""
