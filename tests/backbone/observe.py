"""What passes the ports of sites during one forward, seen by hooks and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.backbone.site_table import Argument, RowSlice, Site

Args = tuple[Any, ...]

__all__ = ["forward", "perturbed", "read_ports", "rows_of", "written"]


def forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the first tensor that the model puts out."""
    with torch.no_grad():
        return model(**batch)[0]


def first(result: object) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def argument(module: nn.Module, name: str | None, args: Args,
             kwargs: dict[str, Any]) -> Tensor:
    if name is None:
        return args[0]
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments[name]


def read_ports(model: PreTrainedModel, sites: Iterable[Site], batch: dict[str, Tensor]
               ) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by label the (input, output) of every site, in its first call of the forward."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:
            place = site.input or Argument(site.module, "")
            source = model.get_submodule(place.module)

            def read(module: nn.Module, args: Args, kwargs: dict[str, Any], label: str = site.label,
                     name: str | None = place.name or None) -> None:
                if label not in inputs:
                    inputs[label] = argument(module, name, args, kwargs).detach().clone()

            def write(_module: nn.Module, _args: Args, result: object,
                      label: str = site.label) -> None:
                if label not in outputs:
                    outputs[label] = first(result).detach().clone()

            hooks.callback(source.register_forward_pre_hook(read, with_kwargs=True).remove)
            target = model.get_submodule(site.module)
            hooks.callback(target.register_forward_hook(write).remove)
        forward(model, batch)
    return {label: (inputs[label], outputs[label]) for label in outputs}


@contextmanager
def written(model: PreTrainedModel, sites: Iterable[Site], value: float) -> Generator[None]:
    """Replace the output port of ``sites`` by ``value`` throughout."""

    def replace(_module: nn.Module, _args: Args, result: object) -> object:
        filled = torch.full_like(first(result), value)
        return (filled, *result[1:]) if isinstance(result, tuple) else filled

    with ExitStack() as hooks:
        for site in sites:
            handle = model.get_submodule(site.module).register_forward_hook(replace)
            hooks.callback(handle.remove)
        yield


def rows_of(cut: RowSlice) -> Tensor:
    """Return the output rows of a slice, by the contract's formula."""
    grid = torch.arange(cut.groups * cut.size).view(cut.groups, cut.size)
    return grid[:, cut.start:][:, :cut.length].reshape(-1)


@contextmanager
def perturbed(model: PreTrainedModel, site: Site) -> Generator[None]:
    """Add noise to the weight rows of ``site`` meanwhile."""
    weight = model.get_parameter(f"{site.module}.weight")
    kept = weight.detach().clone()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        by_row = weight.T if site.transposed else weight
        rows = torch.arange(len(by_row)) if site.rows is None else rows_of(site.rows)
        by_row[rows] += torch.randn(by_row[rows].shape, generator=generator)
        yield
        weight.copy_(kept)
