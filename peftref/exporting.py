"""What of an attached adapter goes into files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftref.artifact import replaced_folder, write_files, write_peft
from peftref.artifact.folder import HEAD
from peftref.artifact.peft_format import LowRank
from peftref.backbone.hf import weight_hash
from peftref.errors import ArtifactError
from peftref.lowering.low_rank import low_rank_factors
from peftref.lowering.original import original_class
from peftref.lowering.state import settled
from peftref.lowering.swap import state_of
from peftref.lowering.weight import is_transposed
from peftref.plugins import plugins_of

if TYPE_CHECKING:
    from peftref.adapted import Adapted

__all__ = ["export_peft", "save"]


def save(adapted: Adapted, path: Path, metadata: Mapping[str, Any]) -> Path:
    """Write an artifact folder; what was at ``path`` is replaced in one move.

    Raises:
        ArtifactError: it cannot be written, or the adapter is merged.
    """
    _refuse_merged(adapted)
    tensors = dict(adapted.state_dict())
    tensors.update({f"{HEAD}{name}": tensor for name, tensor in adapted.head.items()})
    with replaced_folder(path) as folder:
        write_files(folder, _info(adapted, metadata), tensors)
        if not adapted.plan.servable["peft"]:
            _write_peft(adapted, folder / "peft")
    return path


def _refuse_merged(adapted: Adapted) -> None:
    if adapted.merged:
        raise ArtifactError("the adapter is merged into the backbone; unmerge before saving")


def _info(adapted: Adapted, metadata: Mapping[str, Any]) -> dict[str, Any]:
    model, root = adapted.model, adapted.root()
    if root.weight_hash is None:
        # The backbone is frozen while anything is attached, so that one reading serves.
        root.weight_hash = weight_hash(model)  # pyright: ignore[reportArgumentType]
    config = getattr(model, "config", None)
    backbone = {
        "name": getattr(config, "_name_or_path", "") or None,
        "model_type": getattr(config, "model_type", None),
        "class": original_class(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "hash": root.weight_hash,
    }
    packages = ("peftref", "torch", "transformers")
    row = adapted.plan.table.row
    return {
        "composition": adapted.plan.composition.model_dump(mode="json"),
        "backbone": backbone,
        **({} if row is None else {"sites": row.model_dump(mode="json", exclude_none=True)}),
        "seed": adapted.seed,
        "trainable_parameters": adapted.plan.trainable_parameters,
        "plugins": plugins_of(adapted.plan),
        "versions": {name: version(name) for name in packages if _installed(name)},
        "metadata": dict(metadata),
    }


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def export_peft(adapted: Adapted, path: Path) -> Path:
    """Write the PEFT format into a new folder."""
    blockers = adapted.plan.servable["peft"]
    if blockers:
        shown = "; ".join(blockers[:5])
        raise ArtifactError(f"PEFT's LoRA format cannot express this: {shown}")
    _refuse_merged(adapted)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path}: exists already; give a new folder")
    _write_peft(adapted, path)
    return path


def _write_peft(adapted: Adapted, folder: Path) -> None:
    attachment = adapted.attached()
    factors: dict[str, LowRank] = {}
    with torch.no_grad(), settled(state_of(m) for m in attachment.modules.values()):
        for plan in adapted.plan.modules:
            module = attachment.modules[plan.path]
            factors[plan.path] = low_rank_factors(module, adapted.name)
    config = getattr(adapted.model, "config", None)
    write_peft(
        folder,
        factors,
        base_model=getattr(config, "_name_or_path", "") or None,
        fan_in_fan_out=any(is_transposed(m) for m in attachment.modules.values()),
    )
