"""Weights of linear modules, whatever stores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftref.backbone.hf.offload import offloaded_tensor
from peftref.errors import BackboneError

__all__ = ["dense_weight", "is_plain_linear", "is_product", "is_transposed", "store_weight",
           "takes_ops"]


# Classes of transformers with a forward of their own that is the plain product all the same.
_PRODUCTS = ("FalconLinear",)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (d_in, d_out)."""
    return isinstance(module, Conv1D)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is ``x W^T + b`` with an ordinary weight, and nothing else."""
    return is_product(module) and type(module.weight.data) in (Tensor, nn.Parameter)


def takes_ops(module: nn.Module) -> bool:
    """Whether a fast op may stand for the module's product.

    Falcon adds to the result in place, which autograd allows for no view that an op returns.
    """
    return is_plain_linear(module) and all(
        base.__name__ not in _PRODUCTS for base in type(module).__mro__)


def is_product(module: nn.Module) -> bool:
    """Whether the module is ``x W^T + b``, however the weight is stored."""
    for base in type(module).__mro__:
        if base in (nn.Linear, Conv1D):
            return True
        own = "forward" in base.__dict__ and base.__name__ not in _PRODUCTS
        if own and not getattr(base, "peftref_swapped", False):
            return False
    return False


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as an ordinary (d_out, d_in) tensor, dequantised where it must be."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_meta:
        brought = offloaded_tensor(module, "weight")
        weight = weight if brought is None else brought
    if weight is None:
        raise BackboneError(f"{type(module).__name__} has no weight of its own")
    plain = weight if type(weight.data) is Tensor else _dequantised(weight)
    return plain.mT if is_transposed(module) else plain


def _dequantised(weight: Tensor) -> Tensor:
    """The values of a quantised or otherwise wrapped tensor; a wrapped plain one is itself."""
    form = getattr(weight, "dequantize", None)
    return weight if form is None or type(weight).__name__ == "DTensor" else form()


def store_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """Return ``weight`` (d_out, d_in) laid out and typed as the module stores it."""
    stored = module._parameters["weight"]
    laid = weight.mT if is_transposed(module) else weight
    return laid.to(stored.dtype).contiguous() if isinstance(stored, torch.Tensor) else laid
