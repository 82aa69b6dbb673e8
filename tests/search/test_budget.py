"""Budgets: what they buy, what they forbid, and a device whose memory ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from peftref.errors import DeviceMemoryError, SearchError
from peftref.search.pareto import undominated
from peftref.search.purchase import purchase
from peftref.search.run import Tools, search
from peftref.search.study import Screened
from peftref.training import session as training
from peftref.training.session import TrainingSession
from peftref.training.settings import RunSettings
from tests.search.fake_session import FakeSession, make_session, size_of
from tests.search.runs import FakeScreen, run_of

MIB = 2**20


class Shop(FakeScreen):
    """A MiB a parameter, a tenth of a second a step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Mapping[str, int] = {"train": 320, "validation": 0}

    def __call__(self, expression: str | None) -> Screened:
        size = size_of(expression)
        return Screened(size, memory=size * MIB)

    def seconds(self, expression: str) -> float:
        return 0.1


def test_what_a_budget_buys():
    run = run_of(trials=None, budget="1000s", workers=1, confirm_seeds=0)
    bought = purchase(run, Shop())
    steps = 30  # three epochs of 320 rows by 32
    assert (bought.steps, bought.candidate_seconds) == (steps, pytest.approx(0.1 * steps))
    assert bought.candidates == int((1000 - 0.3 * 3) / (3 * 1.15))


def test_nothing_feasible_is_said_before_training():
    with pytest.raises(SearchError, match="predicted, limit"):
        purchase(run_of(memory="1MiB"), Shop())


def test_what_needs_more_memory_is_not_trained(tmp_path: Path):
    run = run_of(memory=900 * MIB, trials=3, confirm_seeds=0)
    report = search(run, tmp_path / "r", Tools(lambda _: Shop(), make_session, lambda _: "{}"),
                    lambda _: None)
    trained = [row for row in report["trials"] if row["outcome"] == "trained"]
    refused = [row for row in report["trials"] if row["outcome"] == "infeasible"]
    assert trained
    assert refused
    assert all(row["parameters"] <= 900 for row in trained)
    assert all(row["parameters"] > 900 and "as predicted" in row["error"] for row in refused)


class Small(FakeSession):
    """A device that no prefix fits into."""

    def fit(self, job: Any, report: Any) -> Any:
        if "prefix" in (job.composition or ""):
            raise DeviceMemoryError("full")
        return super().fit(job, report)


def test_memory_that_ends_makes_a_candidate_infeasible(tmp_path: Path):
    tools = Tools(lambda _: Shop(), Small, lambda _: "{}")
    report = search(run_of(trials=4, confirm_seeds=0), tmp_path / "r", tools, lambda _: None)
    ended = [row for row in report["trials"] if row["error"] == "full"]
    assert ended
    assert all(row["outcome"] == "infeasible" for row in ended)


def test_undominated_in_three_objectives():
    losses = [(0.0, 2.0, 1.0), (1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 1.0, 1.0)]
    assert undominated(losses) == [0, 1]


@pytest.mark.parametrize("fits", [2, 0])
def test_a_batch_that_memory_does_not_hold_is_divided(fits: int, monkeypatch: pytest.MonkeyPatch):
    settings = RunSettings.model_validate({
        "backbone": "minilm", "data": {"source": "trec6", "limit": 16}, "batch_size": 8,
        "steps": 1, "max_length": 16,
    })
    real, tried = training.SessionTrainer.training_step, list[int]()

    def step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("simulated")
        return real(self, model, inputs, *args)

    monkeypatch.setattr(training.SessionTrainer, "training_step", step)
    session = TrainingSession(settings)
    if fits:
        done = session.fit("bitfit")
        assert (done.micro_batch, done.steps) == (2, 1)
        assert tried == [8, 4, 2, 2, 2, 2]  # the same eight rows a step
    else:
        with pytest.raises(DeviceMemoryError, match="1 rows at once"):
            session.fit("bitfit")
        assert tried == [8, 4, 2, 1]
