"""The class of the whole model is swapped too, and must have an effect."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

import peftref
from peftref.errors import BackboneError
from tests.backbone.tiny import inputs, tiny


def test_a_forward_that_another_library_put_on_the_model_is_refused() -> None:
    model = tiny("bert")
    plain = model.forward
    model.forward = types.MethodType(lambda self, **given: plain(**given), model)
    with pytest.raises(BackboneError, match="the model: its forward was replaced"):
        peftref.attach(model, "prompt_tuning(length=3)")
    del model.__dict__["forward"]
    assert not any("peftref" in name for name, _ in model.named_modules())


def test_a_hook_of_accelerate_on_the_model_goes_on_and_the_prompt_has_effect() -> None:
    model = tiny("bert").eval()
    given: dict[str, Tensor] = inputs("bert")
    with torch.no_grad():
        bare = model(**given).last_hidden_state
        expected = _with_prompt(tiny("bert").eval(), given)
        add_hook_to_module(model, ModelHook())
        adapted = peftref.attach(model, "prompt_tuning(length=3)")
        assert torch.equal(model(**given).last_hidden_state, expected)
        assert not torch.equal(expected, bare)
        adapted.detach()
        assert torch.equal(model(**given).last_hidden_state, bare)


def _with_prompt(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    peftref.attach(model, "prompt_tuning(length=3)")  # pyright: ignore[reportArgumentType]
    return model(**given).last_hidden_state
