"""Whether a trained classifier notices rows that are unlike its training rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import pinvh
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.backbone.hf import head_modules
from peftref.errors import ArtifactError, BackboneError, DataError
from peftref.training.encode import Collate, Row, batches_by_length
from peftref.training.inference import collator_of, rows_of
from peftref.training.restore import Opened

__all__ = ["ClassGaussians", "Detection", "Seen", "detection", "energy", "look", "ood_artifact",
           "ood_scores", "softmax_score"]

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a classifier made of rows: ``logits`` (N, C) and ``features`` (N, d) that it read."""

    logits: Array
    features: Array


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a score tells foreign rows from known ones.

    Attributes:
        auroc: chance that a foreign row scores above a known one; ties count half.
        fpr95: share of foreign rows that pass where 95 % of the known ones pass.
    """

    auroc: float
    fpr95: float


def softmax_score(logits: Array) -> Array:
    """Return ``-max_c softmax(logits)_c`` (Hendrycks and Gimpel 2017, arXiv:1610.02136)."""
    return -softmax(logits, axis=-1).max(axis=-1)


def energy(logits: Array, temperature: float = 1.0) -> Array:
    """Return ``-T log sum_c exp(logits_c / T)`` (Liu et al. 2020, arXiv:2010.03759)."""
    return -temperature * logsumexp(logits / temperature, axis=-1)


class ClassGaussians:
    """A Gaussian for each class, with one covariance: the distance to the nearest mean.

    ``score(f) = min_c (f - m_c)^T S^-1 (f - m_c)``, ``S`` the mean over all rows of
    ``(f - m_c)(f - m_c)^T``, by its pseudo-inverse (Lee et al. 2018, arXiv:1807.03888). What a
    norm has taken out of the features is rounding noise, and counts as no variance.

    Args:
        features: (N, d) of training rows.
        labels: (N,) their classes.
    """

    def __init__(self, features: Array, labels: Sequence[int]) -> None:
        known, numbers = np.unique(np.asarray(labels), return_inverse=True)
        # Differences of large, near numbers are squared.
        wide = features.astype(np.float64)
        self.means = np.stack([wide[numbers == c].mean(axis=0) for c in range(len(known))])
        centred = wide - self.means[numbers]
        noise = max(np.finfo(np.float64).eps, np.finfo(features.dtype).eps ** 2)
        covariance = centred.T @ centred / len(centred)
        self._inverse = pinvh(covariance, rtol=covariance.shape[0] * noise)

    def score(self, features: Array) -> Array:
        """Return the squared distance (N,) to the nearest mean."""
        centred = features.astype(np.float64)[:, None] - self.means
        return np.einsum("ncd,de,nce->nc", centred, self._inverse, centred, optimize=True).min(1)


def detection(known: Array, foreign: Array) -> Detection:
    """Measure a score that is higher for foreign rows.

    Raises:
        DataError: one side has no rows.
    """
    if not len(known) or not len(foreign):
        raise DataError("telling foreign rows from known ones needs rows of both")
    scores = np.concatenate([known, foreign])
    is_foreign = np.repeat([0, 1], [len(known), len(foreign)])
    # A row passes as known when its score is low.
    foreign_passed, known_passed, _ = roc_curve(1 - is_foreign, -scores, drop_intermediate=False)
    first = int(np.argmax(known_passed >= 0.95))
    return Detection(float(roc_auc_score(is_foreign, scores)), float(foreign_passed[first]))


def ood_scores(
    train: Seen, labels: Sequence[int], known: Seen, foreign: Seen
) -> Mapping[str, Detection]:
    """Return how well each score tells foreign rows from known ones.

    Args:
        train: training rows, for means and covariance.
        labels: their classes.
        known: rows of the kind that the model was trained on, but not trained on.
        foreign: rows of another kind.
    """
    gaussians = ClassGaussians(train.features, labels)
    measures: Mapping[str, Callable[[Seen], Array]] = {
        "softmax": lambda seen: softmax_score(seen.logits),
        "energy": lambda seen: energy(seen.logits),
        "mahalanobis": lambda seen: gaussians.score(seen.features),
    }
    return {name: detection(of(known), of(foreign)) for name, of in measures.items()}


def look(model: PreTrainedModel, rows: Sequence[Row], collate: Collate, batch: int) -> Seen:
    """Return logits of rows and the features that the last linear of the head read.

    Raises:
        BackboneError: the head ends in no linear module.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with _last_linear(model) as calls:
        for numbers in batches_by_length([len(row["input_ids"]) for row in rows], batch):
            inputs = collate([rows[number] for number in numbers])
            inputs = {name: value.to(model.device) for name, value in inputs.items()
                      if name != "labels"}
            calls.clear()
            logits: Tensor = model(**inputs).logits
            if not calls or calls[-1][1].shape[-1] != logits.shape[-1]:
                raise BackboneError(
                    f"the head of {type(model).__name__} ends in no linear module, so it has no "
                    "features to measure distances in"
                )
            features = _read(*calls[-1], logits)
            pairs = zip(logits.float().cpu(), features.float().cpu(), strict=True)
            found |= dict(zip(numbers, pairs, strict=True))
    ordered = [found[number] for number in range(len(rows))]
    return Seen(torch.stack([row for row, _ in ordered]).numpy(),
                torch.stack([row for _, row in ordered]).numpy())


def ood_artifact(
    opened: Opened, foreign: str, source: str | None = None, split: str | None = None, *,
    batch_size: int = 64,
) -> Mapping[str, Detection]:
    """Return how well a saved classifier's scores tell foreign rows from known ones.

    Args:
        opened: the artifact on its backbone.
        foreign: data of another kind, with the text columns of training; labels are not read.
        source: known data, and ``split`` of it, as for `evaluate_artifact`.
        split: None: the held-out test rows.
        batch_size: rows at once.

    Raises:
        ArtifactError: it is no classifier.
        DataError: the data or the rows that it was trained on are not to be had.
    """
    if opened.head.task != "classification":
        raise ArtifactError(
            f"{opened.artifact.path}: foreign rows are told by the scores of classes; this is "
            f"{opened.head.task}"
        )
    known, strange = rows_of(opened, source, split), rows_of(opened, foreign, None, labelled=False)
    train = rows_of(opened, None, "train")

    def seen(rows: Sequence[Row]) -> Seen:
        return look(opened.model, rows, collator_of(opened), batch_size)

    labels = [int(row["labels"]) for row in train]
    return ood_scores(seen(train), labels, seen(known), seen(strange))


@contextmanager
def _last_linear(model: PreTrainedModel) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Evaluate, noting input and output of every linear of the head in the order of calls."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((args[0], output))

    heads = [model.get_submodule(name) for name in head_modules(model)]
    hooks = [module.register_forward_hook(note) for head in heads for module in head.modules()
             if isinstance(module, nn.Linear)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield calls
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _read(features: Tensor, scored: Tensor, logits: Tensor) -> Tensor:
    """Return the features (B, d) that gave the logits (B, C).

    A decoder scores every token and keeps one for each row: the one whose scores came out.
    """
    if scored.dim() == logits.dim():
        return features
    same = (scored == logits.unsqueeze(1)).all(-1).to(torch.int)
    position = same.argmax(dim=1)
    return features[torch.arange(len(features), device=features.device), position]
