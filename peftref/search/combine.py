"""Trained adapters of one composition as one: a weighted sum of tensors, found without gradients.

    done = peftref.combine(adapted, ["news", "mail", "law"], [few_shot_batch])
    adapted.save("mine", weights=done.weights)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import TrialState
from torch import Tensor

from peftref.adapted import Adapted
from peftref.artifact import Artifact, read
from peftref.backbone.hf import weight_hash
from peftref.errors import ArtifactError, CompositionError, SearchError

__all__ = ["Combined", "combine", "weighted_sum"]

State = Mapping[str, Tensor]
Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Combined:
    """The best weights found.

    Attributes:
        weights: one for each artifact.
        loss: mean loss of the batches with them; ``backbone``: that with all weights zero.
        evaluations: how many weights were tried.
    """

    weights: tuple[float, ...]
    loss: float
    backbone: float
    evaluations: int


def combine(
    adapted: Adapted, artifacts: Sequence[str | Path], batches: Sequence[Batch], *,
    evaluations: int = 40, bound: float = 1.5, penalty: float = 0.05,
    sampler: BaseSampler | None = None,
) -> Combined:
    """Give ``adapted`` the sum ``sum_i w_i T_i`` of each trained tensor T over artifacts.

    ``w`` minimises ``loss(w) + penalty mean_i |w_i|`` within ``-bound..bound``, beginning at
    zero, where the model is the backbone. Factors are summed, not products: of LoRA,
    ``(sum_i w_i B_i)(sum_i w_i A_i)``, cross terms included. LoraHub, Huang et al. 2023,
    https://arxiv.org/abs/2307.13269

    Args:
        adapted: an adapter of the artifacts' composition. The model's task head stays as it is.
        artifacts: folders that were trained on this backbone.
        batches: labelled rows of the task, on the model's device; few are enough.
        evaluations: weights to try.
        bound: largest size of a weight.
        penalty: of the mean size of the weights.
        sampler: what proposes weights; None: optuna's Gaussian process.

    Raises:
        ArtifactError: an artifact is of another composition, backbone or frozen random tensors.
        CompositionError: with all tensors zero the model is not its backbone ((IA)3, prompts).
        SearchError: there is nothing to combine or to score, or no loss is a number.
    """
    if not artifacts or not batches or evaluations < 1:
        raise SearchError("combine needs an artifact, a batch and an evaluation, at least one each")
    states = _states(adapted, artifacts)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    training = adapted.model.training
    adapted.model.eval()
    kept: State = before
    try:
        adapted.load_state_dict(weighted_sum(states, [0.0] * len(states), _summed(adapted)))
        _check_backbone(adapted, batches[0])

        def loss_of(weights: Sequence[float]) -> float:
            adapted.load_state_dict(weighted_sum(states, weights, _summed(adapted)))
            return _mean_loss(adapted, batches)

        best = _search(loss_of, len(states), evaluations, bound, penalty, sampler)
        kept = weighted_sum(states, best.weights, _summed(adapted))
    finally:
        adapted.load_state_dict(kept)
        adapted.model.train(training)
    return best


def weighted_sum(
    states: Sequence[State], weights: Sequence[float], summed: frozenset[str]
) -> dict[str, Tensor]:
    """Return ``sum_i w_i T_i`` of the tensors named ``summed``, and the first's of the others."""
    total = dict(states[0])
    for name in summed:
        wide = sum(weight * state[name].double()
                   for weight, state in zip(weights, states, strict=True))
        assert isinstance(wide, Tensor)
        total[name] = wide.to(states[0][name].dtype)
    return total


def _summed(adapted: Adapted) -> frozenset[str]:
    return frozenset(t.name for t in adapted.plan.tensors if t.spec.trainable)


def _states(adapted: Adapted, paths: Sequence[str | Path]) -> list[State]:
    artifacts = [read(path) for path in paths]
    backbone = weight_hash(adapted.model)  # pyright: ignore[reportArgumentType]
    own, summed = adapted.state_dict(), _summed(adapted)
    for artifact in artifacts:
        if artifact.composition != adapted.plan.composition or (
                {n: t.shape for n, t in artifact.tensors.items()}
                != {n: t.shape for n, t in own.items()}):
            raise ArtifactError(
                f"{artifact.path}: is of another composition; tensors are summed only where "
                f"techniques and sizes are those of {adapted.plan.composition.composition!r}"
            )
        if artifact.info.get("backbone", {}).get("hash") != backbone:
            raise ArtifactError(f"{artifact.path}: was trained on other weights than this model's")
        _check_frozen(adapted, artifact, artifacts[0], summed)
    return [{n: t.to(own[n].device) for n, t in a.tensors.items()} for a in artifacts]


def _check_frozen(
    adapted: Adapted, artifact: Artifact, first: Artifact, summed: frozenset[str]
) -> None:
    """What is not trained must be the same in all: a sum means nothing over other projections."""
    drawn = any(
        not (spec.trainable or spec.buffer) and spec.seed is None
        for spec in (tensor.spec for tensor in adapted.plan.tensors)
    )
    if drawn and artifact.info.get("seed") != adapted.seed:
        raise ArtifactError(
            f"{artifact.path}: its frozen random tensors are drawn from seed "
            f"{artifact.info.get('seed')}, those of the model from {adapted.seed}"
        )
    for name, value in artifact.tensors.items():
        if name not in summed and not torch.equal(value, first.tensors[name]):
            raise ArtifactError(
                f"{artifact.path}: {name!r} is not trained and differs from that of {first.path}"
            )


def _mean_loss(adapted: Adapted, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        return sum(float(adapted.model(**batch).loss) for batch in batches) / len(batches)


def _check_backbone(adapted: Adapted, batch: Batch) -> None:
    with torch.no_grad():
        found = adapted.model(**batch).logits
        with adapted.disabled():
            plain = adapted.model(**batch).logits
    if found.shape != plain.shape or not torch.allclose(found, plain, rtol=1e-3, atol=1e-4):
        raise CompositionError(
            f"{adapted.plan.composition.composition}: with all its tensors zero the model is not "
            "the backbone, from which the search for weights begins; combine adapters whose "
            "change vanishes then, such as lora"
        )


def _search(
    loss_of: Callable[[Sequence[float]], float], count: int, evaluations: int, bound: float,
    penalty: float, sampler: BaseSampler | None,
) -> Combined:
    sampler = sampler or GPSampler(seed=0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)
    names = [f"w{number}" for number in range(count)]
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(-bound, bound) for name in names
    }
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    losses: dict[int, float] = {}
    for _ in range(evaluations):
        trial = study.ask(space)
        weights = [trial.params[name] for name in names]
        loss = loss_of(weights)
        if math.isfinite(loss):
            losses[trial.number] = loss
            study.tell(trial, loss + penalty * sum(map(abs, weights)) / count)
        else:
            study.tell(trial, state=TrialState.FAIL)
    if 0 not in losses:
        raise SearchError("combine: the loss of the backbone on these batches is not a number")
    best = study.best_trial
    chosen = tuple(float(best.params[name]) for name in names)
    return Combined(chosen, losses[best.number], losses[0], evaluations)
