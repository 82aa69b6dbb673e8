"""The search section of a run file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from peftref.spec.base import Frozen, Scalar
from peftref.training.settings import RunSettings

__all__ = ["Choice", "Objective", "SamplerName", "SearchRun", "SearchSettings", "SpaceSettings",
           "seconds", "size"]

SamplerName = Literal["auto", "gp", "tpe", "nsga2", "random"]
Objective = Literal["quality", "parameters", "step_time", "memory", "latency"]

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt])(i)?[Bb]")


def seconds(value: Any) -> Any:  # noqa: ANN401 - the loader's border
    """Return ``90``, ``"90s"``, ``"8m"`` or ``"1h30m"`` in seconds; anything else as it is."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"a duration is written 90s, 8m or 1h30m, not {value!r}")
    pairs = zip(match.groups(), _UNITS.values(), strict=True)
    return sum(float(n) * unit for n, unit in pairs if n)


def size(value: Any) -> Any:  # noqa: ANN401 - the loader's border
    """Return ``"24GiB"``, ``"512 MiB"`` or ``"24GB"`` in bytes; anything else as it is."""
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"a memory is written 24GiB, 512MiB or 24GB, not {value!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (" KMGT".index(match[2].upper())))


def _share(value: Any) -> Any:  # noqa: ANN401 - the loader's border
    """Check a parameter limit: a count, or a share of the backbone such as ``1%``."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 19:
        return int(value)
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*%", value.strip()):
        raise ValueError(f"a parameter limit is a count or a share such as '1%', not {value!r}")
    return value


class Choice(Frozen):
    """A technique that a candidate may contain, written ``lora`` or in full.

    Attributes:
        use: name, path or expression of one technique.
        vary: its parameters to search, by name; a list narrows the values of the spec. None:
            every parameter for which the spec lists ``search`` values.
        fixed: parameters set for all candidates (``with`` in YAML).
    """

    use: str
    vary: Mapping[str, tuple[Scalar, ...] | None] | None = None
    fixed: Mapping[str, Scalar] = Field(default_factory=dict, alias="with")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:  # noqa: ANN401 - the loader's border
        if isinstance(value, str):
            return {"use": value}
        if isinstance(value, dict) and isinstance(value.get("vary"), list | tuple):
            return {**value, "vary": dict.fromkeys(value["vary"])}
        return value


class SpaceSettings(Frozen):
    """All candidates: subsets of the techniques with their parameters.

    Attributes:
        techniques: what a candidate may contain.
        max_members: how many of them at once.
        layers: shared by all members: ``all``, ``upper``, ``lower``, ``alternate`` or a slice.
        learning_rate: range of the factor on the cited rates of the members.
    """

    techniques: tuple[Choice, ...] = ()
    max_members: int = Field(default=3, ge=1)
    layers: tuple[str, ...] = Field(default=("all", "upper"), min_length=1)
    learning_rate: tuple[float, float] = (0.25, 4.0)

    @model_validator(mode="after")
    def _rates(self) -> Self:
        low, high = self.learning_rate
        if not 0.0 < low <= high:
            raise ValueError(f"'learning_rate' is a range of factors above 0, not {low}..{high}")
        return self


class SearchSettings(Frozen):
    """What is searched, how far, and where it runs.

    Attributes:
        space: the candidates.
        trials: candidates to train, baselines included; None: as many as the budget allows.
        budget: wall time of everything, also confirmation and test; ``8m``.
        max_parameters: trainable parameters without the head; a count or ``1%`` of the backbone.
        memory: most bytes of a training step as predicted (``24GiB``); what needs more is not
            tried.
        objectives: what the front weighs: ``quality`` (the score), trainable ``parameters``,
            seconds a step (``step_time``), predicted peak ``memory``, seconds of one row
            (``latency``).
        servable: forms in which every candidate must be servable, such as ``merged``.
        sampler: ``auto``: gp up to 250 trials, else tpe.
        baseline_sizes: sizes at which each single technique is tried first.
        confirm_seeds: fresh seeds for each finalist; 0 skips confirmation.
        workers: jobs at once.
        executor: where they run.
    """

    space: SpaceSettings = SpaceSettings()
    trials: int | None = Field(default=None, ge=1, le=1_000_000)
    budget: Annotated[
        float | None, BeforeValidator(seconds, json_schema_input_type=float | str | None)
    ] = Field(default=None, gt=0.0, le=1e9)
    max_parameters: Annotated[int | str | None, BeforeValidator(_share)] = None
    memory: Annotated[
        int | None, BeforeValidator(size, json_schema_input_type=int | str | None)
    ] = Field(default=None, gt=0)
    objectives: tuple[Objective, ...] = ("quality", "parameters")
    servable: tuple[str, ...] = ()
    sampler: SamplerName = "auto"
    baseline_sizes: int = Field(default=1, ge=1, le=3)
    confirm_seeds: int = Field(default=3, ge=0)
    workers: int = Field(default=2, ge=1, le=1024)
    executor: Literal["inline", "processes"] = "processes"

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        if len(set(self.objectives)) < max(1, len(self.objectives)) or not self.objectives:
            raise ValueError("'objectives' names at least one, and each of them once")
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.budget is None:
            raise ValueError("a search needs an end: 'trials', 'budget' or both")
        return self


class SearchRun(RunSettings):
    """A run file that is searched: the settings of every training, and of the search."""

    search: SearchSettings

    @model_validator(mode="after")
    def _space_not_composition(self) -> Self:
        if self.composition is not None:
            raise ValueError("a search has 'search.space' in place of 'composition'")
        return self

    def training(self) -> RunSettings:
        """Return what a worker needs."""
        names = RunSettings.model_fields
        return RunSettings(**{name: getattr(self, name) for name in names})
