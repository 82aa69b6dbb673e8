"""What a finished run writes: the artifact, and all that is needed to load it in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftref.adapted import Adapted
from peftref.artifact.folder import HEAD, replaced_folder, write_files
from peftref.backbone.hf import weight_hash
from peftref.training.floor import HeadOnly
from peftref.training.run import Progress
from peftref.training.settings import settings_text
from peftref.training.trainer import Trained

if TYPE_CHECKING:
    from peftref.training.session import Order, TrainingSession

__all__ = ["RUN_FILE", "save_artifact"]

RUN_FILE = "run.yaml"


def save_artifact(
    session: TrainingSession, adapted: Trained, order: Order, done: Progress, output: Path
) -> Path:
    """Write the artifact of a run and its settings as a run file.

    Raises:
        ArtifactError: the place is taken by something else, or cannot be written.
    """
    metadata = _metadata(session, order, done)
    if isinstance(adapted, Adapted):
        adapted.save(output, **metadata)
    elif isinstance(adapted, HeadOnly):
        _save_head(adapted, order.seed, metadata, output)
    (output / RUN_FILE).write_text(settings_text(session.settings), encoding="utf-8")
    return output


def _metadata(session: TrainingSession, order: Order, done: Progress) -> dict[str, Any]:
    data, head = session.data, session.backbone.head
    return {
        "backbone": _place(session.settings.backbone),
        "task": head.task,
        "label_names": list(head.label_names),
        "pooling": head.pooling,
        "columns": asdict(data.columns),
        "max_length": session.max_length,
        "metric": session.metric,
        "metrics": {"validation": dict(done.metrics)},
        "data": {
            "source": data.source, "fingerprint": data.fingerprint,
            "rows": {name: len(rows) for name, rows in data.splits.items()},
        },
        "learning_rate": order.learning_rate,
        "rate": order.rate,
        "steps": done.step,
        "run": session.settings.model_dump(mode="json", exclude_none=True),
    }


def _place(name: str) -> str:
    """Return a folder's full path, so that the artifact can be opened from anywhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _save_head(head: HeadOnly, seed: int, metadata: Mapping[str, Any], output: Path) -> None:
    model = head.model
    info = {
        "composition": None,
        "backbone": {
            "name": getattr(model.config, "_name_or_path", "") or None,
            "model_type": model.config.model_type,
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "hash": weight_hash(model),
        },
        "seed": seed,
        "trainable_parameters": 0,
        "plugins": [],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "metadata": dict(metadata),
    }
    with replaced_folder(output) as folder:
        write_files(folder, info, {f"{HEAD}{name}": value for name, value in head.head.items()})
