"""A backbone without a row: its inferred or corrected row is used and kept; doubts give a draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import peftref
from peftref.backbone.family import read_family
from peftref.backbone.hf import infer, inferred_table, meta_model, site_table
from peftref.cli.app import main
from peftref.errors import BackboneError, SitesError, SpecError
from peftref.training.settings import RunSettings, settings_text
from tests.backbone.observe import forward
from tests.backbone.tiny import inputs, tiny, tiny_config

TECHNIQUE = "lora(rank=2) + prefix_tuning(length=2)"


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the built-in rows away."""
    monkeypatch.setattr("peftref.backbone.hf.table.families", dict)


def _never(_model: object) -> None:
    raise AssertionError("inferred again")


@pytest.mark.usefixtures("unlisted")
def test_an_artifact_on_an_inferred_row_is_restored_by_the_stored_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny("llama", "causal_lm"), inputs("llama", "causal_lm")
    adapted = peftref.attach(model, TECHNIQUE)
    with torch.no_grad():
        for tensor in adapted.trainable.values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    adapted.save(tmp_path / "kept")
    monkeypatch.setattr("peftref.backbone.hf.table.infer", _never)
    other = tiny("llama", "causal_lm")
    with pytest.raises(AssertionError):
        peftref.compile(TECHNIQUE, other)
    restored = peftref.restore(other, tmp_path / "kept")
    assert restored.plan.table.row == adapted.plan.table.row
    assert torch.equal(forward(other, batch), forward(model, batch))
    assert not torch.equal(forward(adapted.detach(), batch), forward(other, batch))


def test_a_backbone_with_a_built_in_row_stores_none(tmp_path: Path) -> None:
    peftref.attach(tiny("llama"), "lora").save(tmp_path / "kept")
    assert "sites" not in json.loads((tmp_path / "kept" / "peftref.json").read_text())


@pytest.mark.usefixtures("unlisted")
def test_the_printed_row_read_from_a_file_gives_the_inferred_table(tmp_path: Path) -> None:
    model, file = tiny("t5"), tmp_path / "t5.yaml"
    file.write_text(infer(model).text(), encoding="utf-8")
    assert site_table(model, read_family(file)) == inferred_table(model)


def test_a_corrected_row_decides(tmp_path: Path) -> None:
    model, file = tiny("gpt2"), tmp_path / "row.yaml"
    text = infer(model).text()
    assert "ffn.up: mlp.c_fc" in text
    file.write_text(text.replace("ffn.up: mlp.c_fc", "ffn.gate: mlp.c_fc"), encoding="utf-8")
    plan = peftref.compile("lora(site='ffn.gate')", model, sites=file)
    assert [each.path for each in plan.modules] == ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]
    with pytest.raises(BackboneError, match=r"ffn\.gate"):
        peftref.compile("lora(site='ffn.gate')", model)
    with pytest.raises(BackboneError, match="is for gpt2, the model is of type 'llama'"):
        peftref.compile("lora", tiny("llama"), sites=file)
    with pytest.raises(SpecError, match="no effect on a plan"):
        peftref.attach(model, plan, sites=file)


def test_a_run_keeps_the_row_and_not_the_path(tmp_path: Path) -> None:
    file = tmp_path / "row.yaml"
    file.write_text(infer(tiny("gpt2")).text(), encoding="utf-8")
    run = RunSettings.model_validate({"backbone": "b", "data": "d", "sites": str(file)})
    assert run.sites == read_family(file)
    file.unlink()
    (tmp_path / "run.yaml").write_text(settings_text(run), encoding="utf-8")
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


def test_a_model_of_any_size_is_inferred_without_its_weights() -> None:
    config = tiny_config("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                         num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)
    model = meta_model(config, "causal_lm")
    assert model.num_parameters() > 60e9
    assert inferred_table(model) == site_table(model)


def test_layers_that_are_not_alike_are_refused() -> None:
    model = tiny("llama")
    model.get_submodule("layers.1.mlp").add_module("extra", torch.nn.Linear(32, 32))
    with pytest.raises(SitesError, match=r"layers\.\*\.mlp\.extra"):
        inferred_table(model)
    short = tiny("llama")
    del short.get_submodule("layers.1")._modules["input_layernorm"]
    with pytest.raises(SitesError, match="layer 1 of layers differs"):
        inferred_table(short)


@pytest.mark.usefixtures("unlisted")
def test_a_draft_is_written_once_and_never_over_a_corrected_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("deberta-v2").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "sites-deberta-v2.yaml", tmp_path / "sites-deberta-v2-2.yaml"
    for expected in (first, first, second):
        if expected is second:
            first.write_text("corrected", encoding="utf-8")
        with pytest.raises(SystemExit) as end:
            main(["check", "lora", "--backbone", "model"])
        assert end.value.code == 2
        assert f"--sites {expected.name}" in capsys.readouterr().err
        assert expected.exists()
    assert first.read_text() == "corrected"
    draft = read_family(second)
    assert draft.stacks["encoder"].layers == "encoder.layer"
    assert draft.stacks["encoder"].layer["ffn.up"].module == ("intermediate.dense",)
    second.write_text(second.read_text().replace("norms: pre", "norms: post"), encoding="utf-8")
    main_ok = ["check", "lora(site='ffn.up')", "--backbone", "model", "--sites", second.name]
    with pytest.raises(SystemExit) as end:
        main(main_ok)
    assert end.value.code == 0
