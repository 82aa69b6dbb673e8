"""A stable name for the weights of a backbone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftref.backbone.hf.modules import base_prefix, head_modules, is_added
from peftref.backbone.hf.offload import offloaded_tensor
from peftref.errors import BackboneError

__all__ = ["weight_hash"]


def weight_hash(model: PreTrainedModel) -> str:
    """Return the sha256 of the backbone's tensors as ``sha256:<hexadecimal>``.

    Every byte is read: a sample would not see a fine-tuned copy that differs in one layer. Each
    tensor has its own digest (of type, shape and bytes), computed in parallel since hashing
    releases the interpreter's lock; the result is the digest of the sorted lines
    ``name digest``. Names are relative to the base model, a tied tensor counts once under its
    first name, and task heads and adapters are left out: so the hash is the same for every task
    model of one checkpoint (up to parts that only some of them have, as BERT's pooler).

    Raises:
        BackboneError: the model is on the meta device and has no weights.
    """
    heads, prefix = head_modules(model), base_prefix(model)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or is_added(name) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_meta:
            owner, _, leaf = name.rpartition(".")
            brought = offloaded_tensor(model.get_submodule(owner), leaf)
            tensor = tensor if brought is None else brought
        if name.split(".")[0] not in heads:
            tensors.update(_plain(name.removeprefix(prefix), tensor))
    meta = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise BackboneError(f"{type(model).__name__} has no weights to hash: {meta!r} is on the "
                            "meta device; load the model first")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, tensors.values()))
    lines = sorted(f"{name} {digest}" for name, digest in zip(tensors, digests, strict=True))
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors inside a quantised or otherwise wrapped one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(data.numpy().data)
    return digest.hexdigest()
