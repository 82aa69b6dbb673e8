"""The study: proposes candidates that are new and feasible, and remembers what became of them.

Only the driver holds one. Optuna 5 is used for its samplers and its storage; the front is ours.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.trial import TrialState

from peftref.errors import SearchError
from peftref.search.record import Record, losses_of
from peftref.search.space import Candidate, Encoding, Space, Value

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from peftref.search.settings import Objective, SamplerName

__all__ = ["Rules", "Screen", "Screened", "Study", "problem_of"]

_GP_TRIALS = 250  # a Gaussian process beats TPE up to here; its cost grows with the cube
_START_HYBRIDS = 6  # random hybrids before the sampler is asked
_RUNNING_TOO = "an equal candidate is being trained"
_REPEATS = 3  # proposals in a row that may be refused before one is drawn
_PATIENCE = 200  # draws without a new feasible candidate before the space counts as exhausted


@dataclass(frozen=True, slots=True)
class Screened:
    """What compiling a candidate on the meta device says; ``problem`` empty: it may be trained.

    ``memory`` is the predicted peak of a training step in bytes, 0: unknown.
    """

    parameters: int
    problem: str = ""
    memory: int = 0


class Screen(Protocol):
    """Counts and checks a candidate without training it or loading a weight."""

    layers: int
    parameters: int

    def __call__(self, expression: str | None) -> Screened:
        """Return exact trainable parameters and what forbids the candidate."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """How a study proposes: most parameters and bytes (None: any), sampler, seed, baselines."""

    max_parameters: int | None
    sampler: SamplerName
    trials: int | None
    seed: int
    baseline_sizes: int = 1
    max_memory: int | None = None
    objectives: tuple[Objective, ...] = ("quality", "parameters")

    @property
    def kind(self) -> SamplerName:
        """The sampler that ``auto`` stands for."""
        if self.sampler != "auto":
            return self.sampler
        return "gp" if self.trials is None or self.trials <= _GP_TRIALS else "tpe"

    @property
    def encoding(self) -> Encoding:
        """What the sampler is best with."""
        return "flat" if self.kind == "gp" else "conditional"


class Study:
    """Candidates with the objectives of the rules: the score goes up, logarithms of costs down."""

    def __init__(self, study: optuna.Study, space: Space, rules: Rules, screen: Screen) -> None:
        self._study = study
        self._space = space
        self._rules = rules
        self._screen = screen
        self._asked: dict[int, optuna.Trial] = {}
        self._encoding: Encoding = study.user_attrs.get("encoding", rules.encoding)
        study.set_user_attr("encoding", self._encoding)
        self.records = read_records(study)
        seed = derived_seed(rules.seed, len(study.get_trials(deepcopy=False)))
        study.sampler = _sampler(rules.kind, seed)
        self._random = random.Random(seed)
        self._close_zombies()
        for point in space.baselines(self._encoding, rules.baseline_sizes):
            study.enqueue_trial(point, skip_if_exists=True)

    def require_feasible(self) -> None:
        """Compile the smallest candidates; no training starts when none of them is allowed.

        Raises:
            SearchError: with the smallest candidate and its problem.
        """
        refused: list[tuple[int, str, str]] = []
        for candidate in self._space.smallest():
            screened = self._screen(candidate.expression)
            problem = self._problem(screened)
            if not problem:
                return
            refused.append((screened.parameters, str(candidate.expression), problem))
        _, smallest, problem = min(refused)
        raise SearchError(f"No candidate is feasible. The smallest is {smallest}: {problem}.")

    def propose(self, now: float) -> Record | None:
        """Return a new candidate that satisfies the constraints, or None: there is none.

        Duplicates, infeasible candidates and candidates that do not compile are told to the
        sampler at once, without training.
        """
        for draw in range(_PATIENCE):
            if self._wants_draw(draw):
                point = self._unseen_point()
                if point is None:
                    return None
                self._study.enqueue_trial(point)
            trial = self._study.ask()
            candidate = self._space.suggest(trial, self._encoding)
            record = self._judge(trial, candidate, now)
            if record.outcome == "running":
                self._asked[trial.number] = trial
                return record
        return None

    def finish(self, number: int, result: Mapping[str, Any]) -> Record:
        """Store the result of a training and tell it to the sampler."""
        curve = tuple((int(step), float(loss)) for step, loss in result["curve"])
        data = {**result, "curve": curve}
        return self._tell(replace(self.records[number], outcome="trained", **data))

    def forbid(self, number: int, error: str, now: float) -> Record:
        """Store that a candidate cannot be trained on this machine."""
        record = replace(self.records[number], outcome="infeasible", error=error, finished=now)
        return self._tell(record)

    def fail(self, number: int, error: str, now: float) -> Record:
        """Store that a training raised; the sampler learns to keep away."""
        record = replace(self.records[number], outcome="failed", error=error, finished=now)
        return self._tell(record)

    def note(self, name: str, value: object) -> None:
        """Store something of the whole study as JSON."""
        self._study.set_user_attr(name, value)

    def noted(self) -> dict[str, Any]:
        """Return all that :meth:`note` stored."""
        return dict(self._study.user_attrs)

    def _wants_draw(self, draw: int) -> bool:
        """Random hybrids come after the baselines, and when the sampler only repeats itself."""
        if self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return False
        known = self.records.values()
        hybrids = sum(r.kind == "hybrid" and r.outcome != "duplicate" for r in known)
        start = _START_HYBRIDS if self._space.most_members > 1 else 0
        return draw >= _REPEATS or hybrids < start

    def _unseen_point(self) -> dict[str, Value] | None:
        """Draw a candidate that was never proposed; None: there seems to be none left."""
        seen = {r.key for r in self.records.values() if r.outcome != "interrupted"}
        for _ in range(_PATIENCE):
            point = self._space.draw(self._random, self._encoding)
            if self._space.decode(point).key not in seen:
                return point
        return None

    def _judge(self, trial: optuna.Trial, candidate: Candidate, now: float) -> Record:
        record = Record(
            number=trial.number, key=candidate.key, composition=candidate.expression,
            members=candidate.members, rate=candidate.rate, parameters=0, started=now,
        )
        equal = self._equal(record.key)
        if equal is not None:
            error = _RUNNING_TOO if equal.outcome == "running" else equal.error
            same = replace(equal, number=trial.number, outcome="duplicate", error=error)
            return self._tell(replace(same, seconds=0.0, started=now, finished=now), trial)
        screened = self._screen(candidate.expression)
        record = replace(record, parameters=screened.parameters, memory=screened.memory)
        if self._rules.max_parameters is not None:
            excess = float(screened.parameters - self._rules.max_parameters)
            trial.set_constraint("max_parameters", excess)
        if self._rules.max_memory is not None:
            trial.set_constraint("memory", float(screened.memory - self._rules.max_memory))
        problem = self._problem(screened)
        if problem:
            record = replace(record, outcome="infeasible", error=problem, finished=now)
            return self._tell(record, trial)
        self.records[trial.number] = record
        trial.set_user_attr("record", asdict(record))
        return record

    def _problem(self, screened: Screened) -> str:
        return problem_of(screened, self._rules.max_parameters, self._rules.max_memory)

    def _equal(self, key: str) -> Record | None:
        for record in self.records.values():
            if record.key == key and record.outcome not in ("interrupted", "duplicate"):
                return record
        return None

    def _tell(self, record: Record, trial: optuna.Trial | None = None) -> Record:
        """Store the record, then close the trial."""
        trial = trial or self._asked.pop(record.number)
        self.records[record.number] = record
        trial.set_user_attr("record", asdict(record))
        self._close(record, trial)
        return record

    def _close(self, record: Record, trial: optuna.Trial | int) -> None:
        """Tell the sampler.

        A training that failed or is forbidden is told as complete with the worst score: a
        Gaussian process never sees a pruned trial and would propose it again. Nothing but the
        sampler reads these values.
        """
        if record.error == _RUNNING_TOO:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        score = record.score if record.score is not None else self._worst()
        values = [
            score if name == "quality" else self._told(name, record)
            for name in self._rules.objectives
        ]
        self._study.tell(trial, values)

    def _told(self, name: Objective, record: Record) -> float:
        """Return the logarithm of a cost; one that no training measured is the worst known."""
        (value,) = losses_of(record, [name])
        if value <= 0 and name != "parameters":
            known = self.records.values()
            value = max((losses_of(each, [name])[0] for each in known), default=0.0)
        return math.log10(max(value, 1.0 if name == "parameters" else 1e-6))

    def _worst(self) -> float:
        scores = [r.score for r in self.records.values() if r.score is not None]
        return min(scores, default=0.0)

    def _close_zombies(self) -> None:
        """Give back what an earlier driver left running: the run folder's lock is ours now."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            known = self.records.get(trial.number)
            if known is not None and known.outcome != "running":
                self._close(known, trial.number)  # killed between storing and telling
                continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                self._study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
            if known is not None:
                self.records[trial.number] = replace(known, outcome="interrupted")


def problem_of(screened: Screened, limit: int | None, memory: int | None) -> str:
    """Return why a screened candidate may not be trained; empty: it may."""
    if screened.problem:
        return screened.problem
    if limit is not None and screened.parameters > limit:
        return f"{screened.parameters:,} trainable parameters, limit {limit:,}"
    if memory is not None and screened.memory > memory:
        needs, has = screened.memory / 2**30, memory / 2**30
        return f"a step needs {needs:.2f} GiB as predicted, limit {has:.2f} GiB"
    return ""


def open_study(
    url: str, *, create: bool, objectives: Sequence[Objective] = ("quality", "parameters")
) -> optuna.Study:
    """Open the study of a run folder.

    Raises:
        SearchError: the database is missing or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if not create:
            return optuna.load_study(study_name="search", storage=url)
        return optuna.create_study(
            study_name="search", storage=url, load_if_exists=True,
            directions=["maximize" if name == "quality" else "minimize" for name in objectives],
        )
    except Exception as error:
        raise SearchError(
            f"The study {url} cannot be opened ({type(error).__name__}: {str(error)[:200]}). "
            "Delete the run folder or choose another with --output."
        ) from error


def read_records(study: optuna.Study) -> dict[int, Record]:
    """Return the records of all proposed candidates by number."""
    records: dict[int, Record] = {}
    for trial in study.get_trials(deepcopy=False):
        data = trial.user_attrs.get("record")
        if data is None:
            continue
        record = Record.from_json(data)
        if record.outcome == "running" and trial.state is TrialState.FAIL:
            record = replace(record, outcome="interrupted")
        records[record.number] = record
    return records


def derived_seed(seed: int, trials: int) -> int:
    """Return the sampler's seed: a resumed study must not repeat the proposals of its first run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{trials}".encode()).digest()[:4])


def _sampler(kind: SamplerName, seed: int) -> BaseSampler:
    samplers = optuna.samplers
    match kind:
        case "gp" | "auto":
            return samplers.GPSampler(seed=seed, n_startup_trials=1)
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=1)
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=20)
        case "random":
            return samplers.RandomSampler(seed=seed)
