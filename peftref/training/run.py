"""One run: when it is scored and saved, and who is told."""

# Transformers' callback signatures are untyped.
# ruff: noqa: ANN401

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback

from peftref.errors import TrainingError
from peftref.training.trainer import trainer

__all__ = ["Progress", "Run", "SessionTrainer"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands at an evaluation: steps done, and the validation split's scores."""

    step: int
    total: int
    loss: float
    metrics: Mapping[str, float]


class Run(TrainerCallback):
    """Decides at each step whether to score and to save.

    Args:
        at: steps after which the validation split is scored.
        keep: whether to write a checkpoint then.
        on_evaluate: told of each score; ends the run by returning True.
        on_step: told steps done and in all.
    """

    def __init__(
        self, at: frozenset[int], *, keep: bool,
        on_evaluate: Callable[[Progress], bool | None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.at = at
        self.keep = keep
        self.watch = on_evaluate
        self.tell = on_step
        self.last: Progress | None = None
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a score at the agreed steps."""
        if self.tell is not None:
            self.tell(state.global_step, state.max_steps)
        control.should_evaluate = state.global_step in self.at
        control.should_save = self.keep and control.should_evaluate
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Pass the score on; stop if asked to."""
        metrics: Mapping[str, float] = kwargs["metrics"]
        scores = {name.removeprefix("eval_"): value for name, value in metrics.items()
                  if name != "epoch"}
        loss = scores["loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {state.global_step} of {state.max_steps}: the validation loss is {loss}; "
                "lower the learning rate, or use dtype float32"
            )
        self.last = Progress(state.global_step, state.max_steps, loss, scores)
        wanted = self.watch(self.last) if self.watch is not None else False
        if wanted and state.global_step < state.max_steps:
            self.stopped = True
            control.should_training_stop = True
        return control


class SessionTrainer(trainer(Trainer)):
    """Scores by a function that draws no random numbers and does not depend on batches.

    So a run gives the same result however often it is scored.
    """

    def __init__(self, *args: Any, scoring: Callable[[], dict[str, float]], **kwargs: Any) -> None:
        """Take ``scoring``, which returns the validation scores, and the base's arguments."""
        self.scoring = scoring
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation split."""
        metrics = {f"eval_{name}": value for name, value in self.scoring().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
