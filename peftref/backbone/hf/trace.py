"""What every module of a model was given and gave back in one forward, and what attended."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from peftref.backbone.hf.modules import named_modules

__all__ = ["Attended", "Call", "Trace", "observe_attention", "traced"]

IMPLEMENTATION = "peftref_probe"
LOG = "_peftref_probe"  # of the modules of an observed model: where their attention is noted


@dataclass(slots=True)
class Call:
    """One call of one module.

    Attributes:
        path: of the module.
        begin: time when it was called.
        end: time when it returned.
        arguments: the tensors that it got, by name.
        first: name of the argument that was given first by position; None: all by keyword.
        output: the first tensor that it returned.
    """

    path: str
    begin: int
    arguments: dict[str, Tensor]
    first: str | None
    end: int = 0
    output: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Attended:
    """One call of the attention interface: (batch, heads, tokens, width) each."""

    path: str
    when: int
    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


@dataclass(slots=True)
class Trace:
    """One forward of a model."""

    calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])
    attended: list[Attended] = field(default_factory=list[Attended])
    clock: int = 0

    def tick(self) -> int:
        """Return the next moment."""
        self.clock += 1
        return self.clock


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    kwargs.pop("softcap", None)  # torch's own attention has none, and refuses it
    result = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)
    path, log = module.__dict__[LOG]
    for trace in log:
        trace.attended.append(Attended(path, trace.tick(), query.detach().clone(),
                                       key.detach().clone(), value.detach().clone(),
                                       result[0].detach().clone()))
    return result


def observe_attention(model: PreTrainedModel) -> list[Trace]:
    """Let ``model`` note its attention in every trace of the returned list, from now on.

    Its attention becomes torch's own, whatever it was: only what reaches it is looked at.
    """
    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(IMPLEMENTATION, _attend)
        AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    log: list[Trace] = []
    for path, module in (("", model), *named_modules(model).items()):
        module.__dict__[LOG] = (path, log)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation_internal = IMPLEMENTATION  # noqa: SLF001
    return log


def traced(model: PreTrainedModel, log: list[Trace], inputs: Mapping[str, Tensor], *,
           calls: bool = True) -> Trace:
    """Run a forward and return what happened.

    Args:
        model: an observed model.
        log: what `observe_attention` returned for it.
        inputs: of the forward.
        calls: note the calls of modules too.
    """
    trace = Trace()
    log.append(trace)
    try:
        with torch.no_grad(), _hooks(model, trace) if calls else ExitStack():
            model(**inputs)
    finally:
        log.remove(trace)
    return trace


@contextmanager
def _hooks(model: PreTrainedModel, trace: Trace) -> Generator[None]:
    with ExitStack() as hooks:
        for path, module in named_modules(model).items():

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                       path: str = path) -> None:
                names = [name for name in inspect.signature(type(module).forward).parameters
                         if name != "self"]
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                tensors = {name: value.detach().clone() for name, value in given.items()
                           if isinstance(value, Tensor)}
                call = Call(path, trace.tick(), tensors, names[0] if args and names else None)
                trace.calls.setdefault(path, []).append(call)

            def after(_module: nn.Module, _args: object, result: object,
                      path: str = path) -> None:
                call = trace.calls[path][-1]
                call.end = trace.tick()
                found = _first_tensor(result)
                call.output = None if found is None else found.detach().clone()

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield


def _first_tensor(result: object) -> Tensor | None:
    if isinstance(result, Mapping):
        result = tuple(result.values())  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    if isinstance(result, tuple | list):
        result = result[0] if result else None  # pyright: ignore[reportUnknownVariableType]
    return result if isinstance(result, Tensor) else None
