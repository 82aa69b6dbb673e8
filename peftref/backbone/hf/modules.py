"""What one module of a model is: kind, widths, bias; and which modules form the task head."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from peftref.backbone.site_table import ADDED, SiteKind

__all__ = ["Measure", "base_prefix", "count_parameters", "head_modules", "is_added", "measure",
           "named_modules", "owners"]


@dataclass(frozen=True, slots=True)
class Measure:
    """Kind and widths of a module; 0 where it says nothing."""

    kind: SiteKind
    d_in: int = 0
    d_out: int = 0
    bias: bool = False
    transposed: bool = False


def is_added(name: str) -> bool:
    """Return whether peftref registered the module or tensor of this dotted name."""
    return ADDED in name.split(".")


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module of the model itself by path, without the root."""
    return {path: module for path, module in model.named_modules()
            if path and not is_added(path)}


def measure(module: nn.Module) -> Measure:
    """Return what ``module`` is; a quantised linear tells its logical widths."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return Measure(SiteKind.LINEAR, d_in, d_out, bias, transposed=True)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int):
        return Measure(SiteKind.LINEAR, d_in, d_out, bias)
    if isinstance(module, nn.Embedding):
        return Measure(SiteKind.EMBEDDING, 0, module.embedding_dim)
    weight = getattr(module, "weight", None)
    norm = any("Norm" in base.__name__ for base in type(module).__mro__)
    if norm and isinstance(weight, Tensor) and weight.dim() == 1:
        return Measure(SiteKind.NORM, len(weight), len(weight), bias)
    if norm and isinstance(weight, Tensor) and weight.dim() == 2:  # one row for each head
        return Measure(SiteKind.MATRIX, weight.shape[1], weight.shape[0], bias)
    return Measure(SiteKind.SPAN)


def base_prefix(model: PreTrainedModel) -> str:
    """Return the path of the base model inside ``model`` with a final dot, or ``""``."""
    base = model.base_model
    for name, child in model.named_children():
        if child is base:
            return f"{name}."
    return ""


def owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return, by identity of each weight tensor, the paths of the modules that own it."""
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            found.setdefault(id(weight), []).append(path)
    return found


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the children outside the base model that are no LM head and have parameters.

    Some models (``T5ForQuestionAnswering``) are their own base model; there a head is a child
    with parameters that the plain model of the same configuration does not have. A model made to
    predict tokens has none: what stands before its LM head (ELECTRA, ModernBERT) is pretrained.
    """
    name = type(model).__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or (
            name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        return ()
    output, base = model.get_output_embeddings(), model.base_model
    inside: set[str] = set()
    if base is model:
        if type(model.config) not in MODEL_MAPPING:
            return ()
        with torch.device("meta"):
            plain = AutoModel.from_config(copy.deepcopy(model.config))
        inside = {name for name, _ in plain.named_children()}
    heads: list[str] = []
    for name, child in model.named_children():
        if child is base or name in inside or is_added(name):
            continue
        language = output is not None and any(module is output for module in child.modules())
        if not language and next(child.parameters(), None) is not None:
            heads.append(name)
    return tuple(heads)


def count_parameters(model: nn.Module, heads: Iterable[str]) -> int:
    """Return the number of parameters of the backbone; a shared tensor counts once."""
    return sum(parameter.numel() for _, parameter in _backbone_parameters(model, tuple(heads)))


def _backbone_parameters(
    model: nn.Module, heads: tuple[str, ...]
) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in heads and not is_added(name):
            yield name, parameter
