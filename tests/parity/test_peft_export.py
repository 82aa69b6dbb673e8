"""What we export, huggingface/peft loads and computes the same."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import peftref
from peftref.errors import ArtifactError, MergeError
from tests.backbone.tiny import inputs, tiny
from tests.parity.peft_pairs import TASKS, logits, perturb

EXPORTED = [
    ("bert", "lora(rank=4, alpha=6)"),
    ("bert", "lora(rank=4, alpha=6, dropout=0.3)"),
    ("bert", "rslora(rank=4, alpha=6, site='{attention,ffn}.*')"),
    # Unequal ranks and scales, one module with two of them, some layers only.
    ("bert", "lora(rank=2, alpha=3) + rslora(rank=5, alpha=7, site='attention.{value,output}')"),
    ("bert", "lora(rank=3, alpha=2, layers='1:', site=ffn.up) + lora(rank=1, alpha=5)"),
    ("bert", "adamix_lora(rank=2, alpha=3, copies=3)"),
    ("bert", "prune(lora(rank=4), keep=0.5, criterion=random)"),
    ("gpt2", "lora(rank=3, alpha=5)"),
    ("gpt2", "lora(rank=3, alpha=5, site='attention.{key,output}') + lora(rank=2, site=ffn.up)"),
    ("gpt2", "lora(rank=3, site='module:.*c_attn')"),
    ("gpt2", "adamix_lora(rank=2, copies=2)"),
    ("llama", "lora(rank=4, alpha=6, site='{attention,ffn}.*')"),
    ("t5", "lora(rank=4, alpha=6, site='{attention,cross_attention}.{query,value}')"),
]


def load(backbone: PreTrainedModel, folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on transformers' API, made for every model
        return peft.PeftModel.from_pretrained(backbone, folder).eval()


@pytest.mark.parametrize(("family", "expression"), EXPORTED)
def test_peft_loads_an_export(family: str, expression: str, tmp_path: Path) -> None:
    backbone = tiny(family, TASKS[family])
    ours = peftref.attach(copy.deepcopy(backbone), expression)
    perturb(ours)
    batch = inputs(family, TASKS[family])
    before = logits(backbone, batch)
    expected = logits(ours.model, batch)
    theirs = load(backbone, ours.to_peft(tmp_path / "exported"))
    assert (expected - before).abs().max() > 1e-3
    # Float32 on random weights: T5, without scaled scores, magnifies the last bits.
    close = 1e-4 if family == "t5" else 1e-6
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=1e-5, atol=close)
    # Loaders such as vLLM's read one rank and one scale and no patterns.
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert not config.keys() & {"rank_pattern", "alpha_pattern"}


def test_an_artifact_carries_the_export(tmp_path: Path) -> None:
    backbone = tiny("bert", "classification")
    ours = peftref.attach(copy.deepcopy(backbone), "lora(rank=2) + rslora(rank=3, site=ffn.up)")
    perturb(ours)
    folder = ours.save(tmp_path / "saved")
    batch = inputs("bert", "classification")
    expected = logits(ours.model, batch)
    theirs = load(copy.deepcopy(backbone), folder / "peft")
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=1e-5, atol=1e-6)
    restored = peftref.restore(backbone, folder)
    torch.testing.assert_close(logits(restored.model, batch), expected, rtol=0, atol=0)


def test_a_disabled_adapter_is_saved_whole_and_not_merged(tmp_path: Path) -> None:
    ours = peftref.attach(tiny("bert", "classification"), "lora(rank=2)")
    perturb(ours)
    with ours.disabled():
        folder = ours.save(tmp_path / "saved")
        with pytest.raises(MergeError, match="disabled"):
            ours.merge()
    batch = inputs("bert", "classification")
    theirs = load(tiny("bert", "classification"), folder / "peft")
    torch.testing.assert_close(
        logits(theirs, batch), logits(ours.model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("expression", "blocked"), [
    ("lora + prefix_tuning", ["prefix_tuning.prefix @ encoder.0.attention"]),
    ("dora", ["dora.magnitude @ encoder.0.attention.query"]),
    ("loha", ["loha.delta @ encoder.0.attention.query"]),
    ("lokr", ["lokr.delta @ encoder.0.attention.query"]),
    ("oft(block=4)", ["oft.rotation @ encoder.0.attention.query"]),
    ("ia3", ["ia3.attention @ encoder.0.attention.key"]),
    ("gate(lora)", ["lora.delta @ encoder.0.attention.query"]),
    ("houlsby_adapter", ["houlsby_adapter.adapter @ encoder.0.attention"]),
])
def test_a_refusal_names_what_peft_cannot_express(
    expression: str, blocked: list[str], tmp_path: Path
) -> None:
    ours = peftref.attach(tiny("bert", "classification"), expression)
    with pytest.raises(ArtifactError) as refusal:
        ours.to_peft(tmp_path / "exported")
    assert all(label in str(refusal.value) for label in blocked)
    assert not (tmp_path / "exported").exists()
    assert not (ours.save(tmp_path / "saved") / "peft").exists()


@pytest.mark.parametrize("combinator", ["sum", "product"])
def test_two_matrices_that_are_not_multiplied_are_no_low_rank_pair(combinator: str) -> None:
    spec = {
        "technique": "two", "reference": {"paper": "none", "url": "https://example.org"},
        "modules": [{
            "name": "delta", "site": {"select": "attention.query"},
            "function": {combinator: [{"linear": {"name": "a"}},
                                      {"linear": {"name": "b", "init": "zeros"}}]},
            "interaction": {"insertion": "parallel", "integration": "add"}}]}
    plan = peftref.compile(spec, tiny("bert", "classification"))
    assert plan.properties.mergeable
    assert plan.servable["peft"]


def test_training_mode_does_not_change_what_is_exported_or_merged(tmp_path: Path) -> None:
    """The copies of a mixture are averaged, although a training forward would draw one."""
    backbone = tiny("bert", "classification")
    ours = peftref.attach(copy.deepcopy(backbone), "adamix_lora(rank=2, copies=3, share=none)")
    perturb(ours)
    batch = inputs("bert", "classification")
    expected = logits(ours.model, batch)
    ours.model.train()
    theirs = load(backbone, ours.to_peft(tmp_path / "exported"))
    ours.merge()
    assert all(module.training for module in ours.model.modules())
    ours.model.eval()
    for model in (theirs, ours.model):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_merged_and_exported_are_never_added_up(tmp_path: Path) -> None:
    """A merged adapter is in the weights already: its export is refused."""
    ours = peftref.attach(tiny("bert", "classification"), "lora")
    ours.merge()
    with pytest.raises(ArtifactError, match="unmerge"):
        ours.to_peft(tmp_path / "exported")
