"""The driver: gives candidates to workers until time or trials end, then confirms and tests.

    race      baselines first, then what the sampler proposes; one seed each
    confirm   the finalists on fresh seeds
    test      the best artifact, once, on the held-out split

Everything that must survive a kill is in the study before the next job starts, so the same
command goes on where it was and loses at most the running jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftref.errors import SearchError
from peftref.search.clock import Clock
from peftref.search.confirm import confirm_seeds, confirmation, finalists, read_confirmed
from peftref.search.executors import Executor
from peftref.search.folder import RunFolder
from peftref.search.jobs import Event, Job
from peftref.search.record import Record, front_of
from peftref.search.settings import SearchRun
from peftref.search.state import live_state
from peftref.search.study import Study

__all__ = ["Driver", "Watcher"]

Watcher = Callable[[dict[str, Any]], None]

_ATTEMPTS = 3  # a job that has killed so many workers is given up
_FINALS = 0.4  # largest share of the budget kept for confirmation and test
_TEST = 0.3  # a test evaluation in units of a training


class Driver:
    """Runs one search to its end.

    Args:
        run: the settings.
        folder: locked.
        study: open.
        open_executor: starts the workers; called only when there is work.
        clock: counts the budget.
        watch: called with the live state after every change.
    """

    def __init__(
        self, run: SearchRun, folder: RunFolder, study: Study,
        open_executor: Callable[[], Executor], clock: Clock, watch: Watcher,
    ) -> None:
        self._run = run
        self._folder = folder
        self._study = study
        self._open_executor = open_executor
        self._executor: Executor | None = None
        self._clock = clock
        self._watch = watch
        self._running: dict[str, Job] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._lost = 0
        self._phase = "race"
        for record in study.records.values():
            if record.outcome == "trained":
                clock.took(record.seconds)

    def run(self) -> None:
        """Search, confirm, test and keep the artifacts of the result.

        Raises:
            SearchError: no candidate is feasible, none could be trained, or no worker can start.
        """
        limits = [self._run.search.trials, self._run.search.budget]
        try:
            if self._study.noted().get("finished") != limits:
                self._race()
                self._confirm()
                self._keep()
                self._test()
                self._study.note("finished", limits)
            self._phase = "done"
        except KeyboardInterrupt:
            self._phase = "interrupted"
            raise
        finally:
            if self._executor is not None:
                self._executor.close()
            self._tell_watcher()

    def _race(self) -> None:
        self._phase = "race"
        self._work(self._next_candidate, self._candidate_done)
        if not finalists(self._study.records.values()):
            raise SearchError(self._why_nothing())

    def _next_candidate(self) -> Job | None:
        known = self._study.records.values()
        used = sum(record.outcome in ("trained", "failed", "running") for record in known)
        trials = self._run.search.trials
        if trials is not None and used >= trials:
            return None
        finals = len(finalists(known)) * self._run.search.confirm_seeds
        rounds = math.ceil(finals / self._workers.slots) + _TEST
        reserve = min(rounds * self._clock.typical, _FINALS * (self._clock.budget or 0.0))
        if not self._clock.allows(reserve):
            return None
        record = self._study.propose(self._clock.now)
        if record is None:
            return None
        name = record.key
        return self._fit(f"trial-{record.number}", record, self._folder.trial(name), self._run.seed)

    def _candidate_done(self, job: Job, event: Event) -> None:
        number = int(job.id.removeprefix("trial-"))
        if event.kind == "finished":
            result = {**event.data, "finished": self._clock.now, "worker": event.worker}
            record = self._study.finish(number, result)
            self._clock.took(record.seconds)
        elif event.data.get("memory"):
            self._study.forbid(number, str(event.data["error"]), self._clock.now)
        else:
            self._study.fail(number, str(event.data["error"]), self._clock.now)

    def _confirm(self) -> None:
        self._phase = "confirm"
        chosen = finalists(self._study.records.values())
        jobs = self._confirmations(chosen)

        def done(job: Job, event: Event) -> None:
            self._study.note(job.id, {**event.data, "ok": event.kind == "finished"})

        def next_job() -> Job | None:
            enough = self._clock.allows(_TEST * self._clock.typical)
            return next(jobs, None) if enough else None

        self._study.note("finalists", [record.number for record in chosen])
        self._work(next_job, done)

    def _confirmations(self, chosen: list[Record]) -> Iterator[Job]:
        """Yield one job a finalist and seed: all finalists on a seed before the next seed."""
        noted = self._study.noted()
        for seed in confirm_seeds(self._run):
            for record in chosen:
                name = confirmation(record, seed)
                if name not in noted:
                    yield self._fit(name, record, self._folder.trial(name), seed)

    def _keep(self) -> None:
        """Keep the artifacts of the front and of the best, and drop the others."""
        best = self._best()
        self._study.note("best", {"number": best[0].number, "seed": best[2]})
        front = front_of(self._study.records.values(), self._run.search.objectives)
        self._folder.clear("front")
        for place, record in enumerate(front, 1):
            name = "-".join(record.members) or "head"
            source = self._folder.trial(record.key)
            if source.is_dir():
                self._folder.keep(source, f"front/{place:02d}-{name}")
        if best[1].is_dir():
            self._folder.keep(best[1], "best")
        needed = {record.key for record in [*front, *finalists(self._study.records.values())]}
        for record in self._study.records.values():
            if record.outcome == "trained" and record.key not in needed:
                self._folder.clear(f"trials/{record.key}")

    def _best(self) -> tuple[Record, Path, int]:
        """Return the winner, the folder of its best training by validation, and that seed."""
        records = self._study.records.values()
        confirmed = read_confirmed(self._run, records, self._study.noted())
        # A mean of fewer seeds is more often lucky: those with most seeds go first.
        winner = max(confirmed, key=lambda c: (len(c.scores), c.mean))
        record = winner.record
        options = [(record.score or 0.0, self._run.seed, self._folder.trial(record.key))]
        for seed, score in winner.scores.items():
            options.append((score, seed, self._folder.trial(confirmation(record, seed))))
        _, seed, folder = max(options, key=lambda option: option[0])
        return record, folder, seed

    def _test(self) -> None:
        """Open the test split once in the life of the run folder."""
        self._phase = "test"
        noted = self._study.noted()
        if "test" in noted or self._clock.over:
            return
        best = noted["best"]
        record = self._study.records[best["number"]]
        self._study.note("test_opened", {**best, "at": self._clock.now})
        job = Job("test", "test", record.composition, str(self._folder.path / "best"))
        jobs = iter([job])

        def done(_: Job, event: Event) -> None:
            ok = event.kind == "finished"
            self._study.note("test", {**best, "ok": ok, "metrics": dict(event.data)})

        self._work(lambda: next(jobs, None), done)

    def _fit(self, name: str, record: Record, folder: Path, seed: int) -> Job:
        latency = "latency" in self._run.search.objectives
        return Job(name, "fit", record.composition, str(folder), rate=record.rate, seed=seed,
                   latency=latency)

    @property
    def _workers(self) -> Executor:
        if self._executor is None:
            self._executor = self._open_executor()
        return self._executor

    def _work(
        self, next_job: Callable[[], Job | None], done: Callable[[Job, Event], None]
    ) -> None:
        """Keep the workers busy until there is no next job; a lost job is given out again."""
        again: list[Job] = []
        while not self._clock.over:
            self._tell_watcher()
            while self._executor is None or self._executor.free:
                job = again.pop() if again else next_job()
                if job is None:
                    break
                self._running[job.id] = job
                self._workers.submit(job)
            if not self._running:
                return
            for event in self._workers.poll(0.25):
                self._handle(event, again, done)
        self._running.clear()  # the budget is spent: their time was given, their result is not

    def _handle(
        self, event: Event, again: list[Job], done: Callable[[Job, Event], None]
    ) -> None:
        if event.kind == "unusable":
            raise SearchError(f"No worker can start: {event.data['error']}")
        if event.kind in ("started", "progress"):
            self._progress[event.job] = {**event.data, "worker": event.worker}
        if event.kind not in ("finished", "failed", "lost"):
            return
        job = self._running.pop(event.job)
        self._progress.pop(event.job, None)
        if event.kind == "lost":
            self._lost += 1
            if job.attempt + 1 < _ATTEMPTS:
                again.append(replace(job, attempt=job.attempt + 1))
                self._running[job.id] = again[-1]
                return
        done(job, event)

    def _why_nothing(self) -> str:
        known = list(self._study.records.values())
        failed = [record for record in known if record.outcome == "failed"]
        if failed:
            return f"None of {len(failed)} candidates could be trained; first: {failed[0].error}"
        forbidden = [record for record in known if record.outcome == "infeasible"]
        if forbidden:
            least = min(forbidden, key=lambda record: record.parameters)
            return (
                f"No candidate is feasible: all {len(forbidden)} proposed are forbidden before "
                f"training. The smallest is {least.label}: {least.error}."
            )
        return (
            f"No training ended within the budget of {self._clock.budget or 0:.0f} s; allow more "
            "time with --budget."
        )

    def _tell_watcher(self) -> None:
        state = live_state(
            self._run, self._phase, self._clock, self._study.records.values(),
            self._running.values(), self._progress, self._lost,
        )
        self._folder.write_state(state)
        self._watch(state)
