"""Training in parts: which tensors train, from which values, at which rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from peftref.errors import CompositionError, TrainingError, unknown_name
from peftref.procedures.base import HEAD, Adapter, Phase, Procedure, ProcedureArguments, matches
from peftref.registry import procedures
from peftref.spec.base import Frozen

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["START", "Part", "Phases", "PhasesArguments"]

START = "start"
_ALL = ("*", HEAD)


class Part(Frozen):
    """One phase.

    Attributes:
        name: what couplings call it (``prune: {when: name}``).
        share: of the steps; shares are divided by their sum.
        train: what trains: members (glob), tensors as ``member:glob``, ``head``.
        rewind: what goes back to earlier values when the phase begins.
        to: which values: ``start``, or the name of an earlier phase for those at its end.
        rate: what the learning rate is multiplied by.
    """

    name: str
    share: float = Field(default=1.0, gt=0.0)
    train: tuple[str, ...] = _ALL
    rewind: tuple[str, ...] = ()
    to: str = START
    rate: float = Field(default=1.0, gt=0.0)


class PhasesArguments(ProcedureArguments):
    """``phases``: in order."""

    phases: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Self:
        before = [START]
        for part in self.phases:
            if part.name in before:
                raise ValueError(f"{part.name!r} cannot name a phase: it is taken")
            if part.to not in before:
                raise ValueError(
                    f"phase {part.name!r} goes back to {part.to!r}; valid: {', '.join(before)}"
                )
            before.append(part.name)
        return self


@procedures.register("phases")
class Phases(Procedure[PhasesArguments]):
    """Training in parts, each with a fresh optimiser and a schedule of its own.

    When a phase begins, couplings act first (``prune`` chooses its masks from the values that
    the phase before left), then tensors go back to earlier values.
    """

    name = "phases"
    Arguments = PhasesArguments

    def __init__(self, arguments: PhasesArguments) -> None:
        super().__init__(arguments)
        self._held: dict[str, dict[str, Tensor]] = {}
        self._current: str | None = None

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        if sum(isinstance(other, Phases) for other in others) > 1:
            raise CompositionError(
                "two members train in phases of their own, which cannot be joined; write one "
                "'phases' for the composition"
            )
        for part in self.arguments.phases:
            for entry in (*part.train, *part.rewind):
                member = entry.partition(":")[0]
                if entry != HEAD and not any(fnmatchcase(name, member) for name in members):
                    raise CompositionError(
                        f"phase {part.name!r}: " + unknown_name("member", member, [*members, HEAD])
                    )

    def phases(self, total: int) -> tuple[Phase, ...]:
        parts = self.arguments.phases
        whole = sum(part.share for part in parts)
        starts, done = list[int](), 0.0
        for part in parts:
            starts.append(round(total * done / whole))
            done += part.share
        if len({*starts, total}) <= len(parts):
            raise TrainingError(
                f"{total} steps are too few for the phases "
                f"{', '.join(part.name for part in parts)}: each needs at least one step"
            )
        return tuple(
            Phase(part.name, start, part.rate)
            for part, start in zip(parts, starts, strict=True)
        )

    def before_phase(
        self,
        adapter: Adapter,
        phase: str,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        import torch

        names = [part.name for part in self.arguments.phases]
        index = names.index(phase)
        self._keep(adapter, names[index - 1] if index else START)
        part = self.arguments.phases[index]
        known = {**adapter.trainable, **adapter.head}
        with torch.no_grad():
            for name in self._chosen(adapter, part.rewind):
                before = self._held[part.to].get(name)
                known[name].zero_() if before is None else known[name].copy_(before)

    def _keep(self, adapter: Adapter, moment: str) -> None:
        """Keep the values of now that a later phase goes back to; what is zero needs no copy."""
        wanted: set[str] = set()
        for part in self.arguments.phases:
            if part.rewind and part.to == moment:
                wanted.update(self._chosen(adapter, part.rewind))
        known = {**adapter.trainable, **adapter.head}
        self._held[moment] = {
            name: known[name].detach().clone()
            for name in sorted(wanted) if bool(known[name].detach().any())
        }

    @staticmethod
    def _chosen(adapter: Adapter, entries: tuple[str, ...]) -> list[str]:
        planned = adapter.planned
        chosen = [n for n in adapter.trainable if matches(n, planned[n].member, entries)]
        return chosen + (list(adapter.head) if HEAD in entries else [])

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        phase = [phase for phase in self.phases(total) if phase.start <= step][-1].name
        if phase == self._current:
            return
        self._current = phase
        part = next(part for part in self.arguments.phases if part.name == phase)
        trained = set(self._chosen(adapter, part.train))
        if not trained:
            raise TrainingError(
                f"phase {phase!r}: nothing trains; train: {', '.join(part.train) or 'nothing'}"
            )
        adapter.rest({*adapter.trainable, *adapter.head} - trained)

    def at_end(self, adapter: Adapter) -> None:
        adapter.rest(())

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{moment}|{name}": tensor
            for moment, tensors in self._held.items() for name, tensor in tensors.items()
        } | {"moments": sorted(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held = {moment: {} for moment in state.get("moments", ())}
        self._current = None
        for key, value in state.items():
            moment, bar, name = key.partition("|")
            if bar:
                self._held.setdefault(moment, {})[name] = value
