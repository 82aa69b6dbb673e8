"""Swapping classes in place: what other code sees of the model stays as it was."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftref
from peftref.errors import BackboneError, MergeError, TrainingError
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

MIXED = "lora(rank=2) + prefix_tuning(length=3) + houlsby_adapter(bottleneck=4) + ln_tuning"
TASK = {"bert": "classification", "gpt2": "causal_lm", "llama": "causal_lm", "t5": "seq2seq_lm"}


def make(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    return tiny(family, TASK[family]), inputs(family, TASK[family])


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("family", list(TASK))
def test_names_classes_and_keys_stay(family: str):
    model, _ = make(family)
    names = [name for name, _ in model.named_modules()]
    kinds = {name: type(module) for name, module in model.named_modules()}
    weights = list(model.state_dict())
    adapted = peftref.attach(model, MIXED)
    after = dict(model.named_modules())
    assert [name for name in after if "peftref" not in name.split(".")] == names
    assert all(isinstance(after[name], kind) for name, kind in kinds.items())
    assert all(type(after[name]).__name__ == kind.__name__ for name, kind in kinds.items())
    assert [key for key in model.state_dict() if ".peftref." not in f".{key}"] == weights
    assert any(".peftref." in f".{key}" for key in model.state_dict())
    adapted.detach()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == weights
    assert not any("peftref" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("family", list(TASK))
def test_a_copy_is_independent(family: str):
    model, given = make(family)
    adapted = randomise(peftref.attach(model, MIXED + " + mix(lora(rank=3), copies=2)"))
    before = logits(model, given)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, given), before)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".peftref." in f".{name}":
                parameter.add_(1.0)
    assert torch.equal(logits(model, given), before)
    assert not torch.allclose(logits(twin, given), before)
    adapted.detach()
    assert not torch.allclose(logits(twin, given), before)


@pytest.mark.parametrize("family", list(TASK))
def test_torch_save_of_the_whole_model(family: str):
    model, given = make(family)
    randomise(peftref.attach(model, MIXED + " + vera(rank=4)"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded, given), logits(model, given))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("family", list(TASK))
def test_save_pretrained_writes_the_backbone_alone(family: str, tmp_path: Path):
    model, given = make(family)
    kind, before = type(model), logits(model, given)
    randomise(peftref.attach(model, MIXED))
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "peftref" in key]  # noqa: SIM118
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [kind.__name__]
    assert "peftref" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(kind.from_pretrained(tmp_path), given), before)


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("family", list(TASK))
def test_two_adapters_leave_in_either_order(family: str, first: str):
    """Each alone is what it is without the other; at the end the backbone is back, bit for bit."""
    model, given = make(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = logits(model, given)
    one = randomise(peftref.attach(model, MIXED, name="a"))
    alone = logits(model, given)
    two = randomise(peftref.attach(model, "oft(block=8) + prefix_tuning(length=2)", name="b"), 1)
    both = logits(model, given)
    assert not torch.allclose(both, alone)
    with two.disabled():
        assert torch.equal(logits(model, given), alone)
    with one.disabled(), two.disabled():
        assert torch.equal(logits(model, given), frozen)
    order = (one, two) if first == "a" else (two, one)
    order[0].detach()
    if first == "b":
        assert torch.equal(logits(model, given), alone)
    order[1].detach()
    assert torch.equal(logits(model, given), frozen)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- refusals --------------------------------------------------------------------------------


def refuse(model: nn.Module, expression: str, match: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(BackboneError, match=match):
        peftref.attach(model, expression)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_parametrised_module_is_refused():
    model, _ = make("bert")
    query = model.bert.encoder.layer[1].attention.self.query
    torch.nn.utils.parametrizations.weight_norm(query)
    refuse(model, "lora", "parametrised")


def test_a_replaced_forward_is_refused():
    model, _ = make("bert")
    query = model.bert.encoder.layer[1].attention.self.query
    query.forward = query.forward
    refuse(model, "lora", "forward was replaced")


def test_a_second_adapter_of_one_name_is_refused():
    model, given = make("bert")
    adapted = randomise(peftref.attach(model, "lora"))
    before = logits(model, given)
    with pytest.raises(BackboneError, match="attached already"):
        peftref.attach(model, "ia3")
    assert torch.equal(logits(model, given), before)
    adapted.detach()


def test_resizing_and_replacing_are_noticed():
    model, given = make("llama")
    adapted = peftref.attach(model, "lora(site='head')")
    with pytest.raises(BackboneError, match="resize before attach"):
        model.resize_token_embeddings(120)
    model.lm_head = nn.Linear(32, 97)
    with pytest.raises(BackboneError, match="lm_head: was replaced after attach"):
        logits(model, given)
    with pytest.raises(BackboneError, match="replaced"):
        adapted.merge()


def test_a_lost_procedure_is_refused_before_the_first_step():
    model, given = make("bert")
    adapted = peftref.attach(model, "adamix(bottleneck=4, copies=2)")
    logits(model, given)
    model.train()
    with pytest.raises(TrainingError, match="does not call it"):
        model(**given)
    adapted.handled = True
    model(**given)


def test_missing_data_is_refused_before_the_first_step():
    model, given = make("bert")
    adapted = peftref.attach(model, "sparse_adapter(criterion='snip')")
    model.train()
    with pytest.raises(TrainingError, match="needs data"):
        model(**given)
    adapted.prepare([{**given, "labels": torch.tensor([0, 1])}])
    model(**given)


def test_generate_with_gates_is_refused():
    model, given = make("gpt2")
    peftref.attach(model, "gate(lora)")
    with pytest.raises(BackboneError, match="depends on all tokens"):
        model.generate(**given, max_new_tokens=2)


def test_merging_beside_another_adapter_is_refused():
    model, given = make("bert")
    one = randomise(peftref.attach(model, "lora", name="a"))
    two = randomise(peftref.attach(model, "dora(rank=2)", name="b"), 1)
    before = logits(model, given)
    with pytest.raises(MergeError, match="adapter 'b' edits this module too"):
        one.merge()
    assert torch.equal(logits(model, given), before)
    two.detach()
    one.merge()


def test_two_adapters_that_normalise_one_weight_are_refused():
    """The magnitude of the first would have no gradient."""
    model, given = make("bert")
    peftref.attach(model, "dora(rank=2)", name="a")
    before = logits(model, given)
    with pytest.raises(BackboneError, match="two adapters normalise"):
        peftref.attach(model, "dora(rank=3)", name="b")
    assert torch.equal(logits(model, given), before)
    peftref.attach(model, "dora(rank=3, site='attention.key')", name="b")


def test_dropout_of_one_adapter_is_kept_or_refused_beside_another():
    model, given = make("bert")
    adapted = randomise(peftref.attach(model, "lora(rank=2, dropout=0.5)", name="a"))
    peftref.attach(model, "loha(rank=8)", name="b")
    model.train()
    assert not torch.equal(logits(model, given), logits(model, given))
    adapted.detach()
    assert torch.equal(logits(model, given), logits(model, given))
    fused, _ = make("gpt2")
    peftref.attach(fused, "lora(rank=2, dropout=0.5)", name="a")
    with pytest.raises(BackboneError, match="set dropout to 0"):
        peftref.attach(fused, "oft(block=8)", name="b")


def test_a_gate_is_refused_where_it_cannot_know_the_padding():
    """A call of an inner module would silently average over padding."""
    model, given = make("gpt2")
    given["attention_mask"][0, -2:] = 0
    peftref.attach(model, "gate(lora)")
    logits(model, given)
    with pytest.raises(BackboneError, match="call the model that was given"):
        model.transformer(**given)
