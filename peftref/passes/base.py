"""What a pass is, and how passes are run in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from peftref.errors import Mark, PeftRefError, SpecError
from peftref.ir.graph import AdapterGraph
from peftref.ir.plan import PassRecord
from peftref.ir.primitive import TensorSpec
from peftref.spec.technique import ProcedureSpec

__all__ = ["Library", "Pass", "PassRecord", "Pipeline", "make_procedure", "wrong_argument"]


class Library(Protocol):
    """The registries that passes may ask; injected, so that no pass imports an entry."""

    def primitive(self, name: str) -> type:
        """The primitive class of that name."""
        ...

    def coupling(self, name: str) -> Any:  # noqa: ANN401 - an entry of an open registry
        """The coupling of that name."""
        ...

    def procedure(self, name: str) -> Any:  # noqa: ANN401 - an entry of an open registry
        """The procedure of that name."""
        ...


class ProcedureFacts(Protocol):
    """What a plan tells of a procedure."""

    @property
    def needs_data(self) -> bool:
        """Whether it must see batches before the first step."""
        ...

    def check(self, members: Sequence[str], others: Sequence[Any]) -> None:
        """Refuse a composition that it does not fit."""
        ...

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        """Refuse tensors, given with their members, that it cannot work with."""
        ...


def make_procedure(spec: ProcedureSpec, library: Library) -> ProcedureFacts:
    """Return the procedure that a spec names, with its arguments checked.

    Raises:
        SpecError: the name or an argument is not known.
    """
    kind = library.procedure(spec.name)
    try:
        return kind(kind.Arguments(**spec.arguments))
    except ValidationError as error:
        raise wrong_argument(f"procedure {spec.name}", error, kind.Arguments, spec.mark) from None


def wrong_argument(
    what: str, error: ValidationError, arguments: type[BaseModel], mark: Mark | None
) -> SpecError:
    """Return the error for the first argument that ``what`` does not take."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return SpecError(
        f"{what}: argument {where!r}: {first['msg']} (found {first['input']!r}); "
        f"valid: {', '.join(arguments.model_fields)}",
        mark=mark,
    )


class Pass(Protocol):
    """A rewrite or an analysis of the graph, in place."""

    @property
    def name(self) -> str:
        """A verb phrase, as printed."""
        ...

    def run(self, graph: AdapterGraph) -> str:
        """Do it; return one line that says what changed."""
        ...


@dataclass(slots=True)
class Pipeline:
    """Passes in order; ``observe`` sees the graph after each."""

    passes: tuple[Pass, ...]
    observe: Callable[[str, AdapterGraph], None] | None = None
    records: list[PassRecord] = field(default_factory=list[PassRecord])

    def run(self, graph: AdapterGraph) -> None:
        """Run all passes.

        Raises:
            PeftRefError: a pass refuses the graph; a note names the pass and those before it.
        """
        for step in self.passes:
            try:
                summary = step.run(graph)
            except PeftRefError as error:
                done = ", ".join(record.name for record in self.records) or "none"
                error.add_note(f"raised in pass {step.name!r}; passes done: {done}")
                raise
            self.records.append(PassRecord(step.name, summary, len(graph)))
            if self.observe is not None:
                self.observe(step.name, graph)
