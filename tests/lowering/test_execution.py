"""Ways to run an attached model: checkpointing, compiling, autocast, hooks, sharding."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import peftref
from peftref.adapted import Adapted
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise
from tests.lowering.test_class_swap import TASK, logits, make

# The old name, which works in every supported release.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

COMPOSITIONS = (
    "lora(rank=2) + prefix_tuning(length=3) + houlsby_adapter(bottleneck=4)",
    "mix(houlsby_adapter(bottleneck=4, site='ffn'), copies=3)",
    "unipelt(bottleneck=4, length=2, hidden=4, rank=2)",
    "oft(block=8) + dora(rank=2) + ia3 + ln_tuning",
    "prompt_tuning(length=3) + pfeiffer_adapter(bottleneck=4)",
)


def gradients(
    adapted: Adapted, given: dict[str, Tensor], *, forwards: int = 1
) -> dict[str, Tensor]:
    """Gradients of a sum over ``forwards`` forwards that draw routes apart, then one backward."""
    torch.manual_seed(11)
    outputs = [adapted.model(**given).logits for _ in range(forwards)]
    total = sum((float(i + 1) * out.square().sum() for i, out in enumerate(outputs)),
                torch.zeros((), dtype=outputs[0].dtype))
    total.backward()
    found = {n: p.grad.clone() for n, p in adapted.trainable.items() if p.grad is not None}
    for parameter in adapted.trainable.values():
        parameter.grad = None
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= relative * value.abs().max(), name


@pytest.mark.parametrize("expression", COMPOSITIONS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", list(TASK))
def test_checkpointing_changes_no_gradient(family: str, reentrant: bool, expression: str):
    """Also of routes, two forwards before the one backward, and of gates beside padding."""
    model = tiny(family, TASK[family], dtype=torch.float64)
    given = inputs(family, TASK[family])
    given["attention_mask"][0, -2:] = 0
    adapted = randomise(peftref.attach(model, expression))
    adapted.handled = True
    model.train()
    plain = gradients(adapted, given, forwards=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(gradients(adapted, given, forwards=2), plain, relative=1e-9)


# Compiling takes seconds: one composition for each family at every run, all of them at night.
_EVERY_RUN = dict(zip(TASK, (COMPOSITIONS[2], COMPOSITIONS[3], COMPOSITIONS[0], COMPOSITIONS[1]),
                      strict=True))


@pytest.mark.parametrize(("family", "expression"), [
    pytest.param(family, expression,
                 marks=() if _EVERY_RUN[family] == expression else pytest.mark.slow)
    for family in TASK for expression in COMPOSITIONS
])
def test_compiled_in_one_graph(family: str, expression: str):
    """As the bare model compiles; outputs and gradients are those of the eager run."""
    model, given = make(family)
    adapted = randomise(peftref.attach(model, expression))
    adapted.handled = True
    expected, eager = gradients(adapted, given), logits(model, given)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, given), eager, rtol=1e-4, atol=1e-5)
    compiled(**given).logits.square().sum().backward()
    close({n: p.grad for n, p in adapted.trainable.items() if p.grad is not None}, expected,
          relative=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("expression", COMPOSITIONS)
def test_autocast_keeps_gradients_in_float32(expression: str):
    model, given = make("llama")
    adapted = randomise(peftref.attach(model, expression))
    adapted.handled = True
    exact = gradients(adapted, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(adapted, given)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in exact.items():  # bfloat16 has 8 bits; sums over tokens lose a few
        assert torch.nn.functional.cosine_similarity(
            found[name].flatten(), value.flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_hooks_in_either_order(hook_first: bool):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model, given = make("bert")
    frozen = logits(model, given)
    query = model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(2, 3, 32)
    expression = "lora(rank=2) + dora(rank=2)"
    adapted = randomise(peftref.attach(model, expression))
    edited = query(x).detach()
    adapted.detach()
    assert torch.equal(logits(model, given), frozen)
    if hook_first:
        add_hook_to_module(query, Doubles())
    adapted = randomise(peftref.attach(model, expression))
    if not hook_first:
        add_hook_to_module(query, Doubles())
    assert torch.equal(query(x), 2 * edited)
    adapted.detach()
    bare = torch.nn.functional.linear(x, query.weight, query.bias)
    torch.testing.assert_close(query(x), 2 * bare)
    remove_hook_from_module(query)
    assert torch.equal(logits(model, given), frozen)


def test_sharded_after_attaching():
    """FSDP2 on one rank: the gradients are those of the whole model; afterwards is refused."""
    from torch.distributed.fsdp import fully_shard

    if torch.distributed.is_initialized():
        pytest.skip("a process group of somebody else")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        expression = "lora(rank=2) + vera(rank=4) + houlsby_adapter(bottleneck=4)"
        model, given = make("bert")
        adapted = randomise(peftref.attach(model, expression))
        expected = gradients(adapted, given)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        layers: list[torch.nn.Module] = list(model.get_submodule("bert.encoder.layer").children())
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**given).logits.square().sum().backward()
        found = {n: p.grad.full_tensor() for n, p in adapted.trainable.items()
                 if p.grad is not None}
        close(found, expected, relative=1e-4)
        late, _ = make("bert")
        fully_shard(late.bert.encoder.layer[0].attention.self.query, mesh=mesh)
        with pytest.raises(peftref.PeftRefError, match="sharded already"):
            peftref.attach(late, "lora")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_run_no_layer_below_the_lowest_edit_backward(reentrant: bool):
    """Reentrant ones must: their first input has to require a gradient."""
    model, given = make("bert")
    last = model.config.num_hidden_layers - 1
    adapted = randomise(peftref.attach(model, f"lora(rank=2, layers=[{last}])"))
    adapted.handled = True
    model.train()
    expected = gradients(adapted, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    needed: list[bool] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, _a, y: needed.append(y.requires_grad))
    close(gradients(adapted, given), expected, relative=1e-5)
    assert set(needed) == {reentrant}
