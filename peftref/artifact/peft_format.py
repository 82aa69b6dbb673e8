"""A low-rank composition in huggingface/peft's LoRA format, as PEFT and vLLM load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["LowRank", "write_peft"]

LowRank = tuple[Tensor, Tensor]
"""(A (r, d_in), B (d_out, r)) with all scales folded into B."""


def write_peft(
    folder: Path,
    factors: Mapping[str, LowRank],
    *,
    base_model: str | None,
    fan_in_fan_out: bool,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Unequal ranks are padded with zeros to the largest, and alpha equals the rank, because
    loaders such as vLLM's read one rank and ignore patterns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in factors.items():
        pad = rank - a.shape[0]
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = _whole(torch.nn.functional.pad(a, (0, 0, 0, pad)))
        tensors[f"{key}.lora_B.weight"] = _whole(torch.nn.functional.pad(b, (0, pad)))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(factors),
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
