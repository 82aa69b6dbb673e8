"""The table against the model it was read from: head, ties, counts, meta device, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FNetConfig,
    FNetModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForQuestionAnswering,
)

from peftref.backbone.family import families, read_family
from peftref.backbone.hf import meta_model, site_table
from peftref.backbone.rows import row_slice
from peftref.backbone.selection import select
from peftref.backbone.site_table import ADDED, SiteKind
from peftref.errors import BackboneError, SpecError
from peftref.spec.selector import SiteSelector
from tests.backbone.observe import rows_of
from tests.backbone.tiny import DECODERS, FAMILIES, OTHERS, Task, tiny, tiny_config


def unlisted() -> PreTrainedModel:
    """Return a model that mixes tokens by a Fourier transform: no row can give it attention."""
    return FNetModel(FNetConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2,
                                intermediate_size=48, max_position_embeddings=32))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_model_has_the_sites_of_its_backbone(family: str) -> None:
    bare = tiny(family)
    table = site_table(bare)
    tasks: list[Task] = ["classification"]
    if family in DECODERS:
        tasks.append("causal_lm")
    if family == "t5":
        tasks.append("seq2seq_lm")
    for task in tasks:
        model = tiny(family, task)
        other = site_table(model)
        labels = [s.label for s in other if s.role != "head"]
        pooler = family == "roberta"  # its sequence classifier is built without the pooler
        assert labels == [s.label for s in table if not (pooler and s.role == "pooler")]
        assert [s.role for s in other if s.role == "head"] == ["head"] * task.endswith("lm")
        assert bool(other.head_modules) == (task == "classification")
        for site in other:
            assert type(model.get_submodule(site.module)).__name__
        if not pooler and task != "causal_lm":
            assert other.frozen_parameters == sum(p.numel() for p in bare.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_meta_device_gives_the_same_table(family: str) -> None:
    task: Task = "features" if family in OTHERS else "classification"
    task = "seq2seq_lm" if family == "t5" else task
    labels = 3 if task == "classification" else None
    model = meta_model(tiny_config(family), task, labels)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert site_table(model) == site_table(tiny(family, task))


@pytest.mark.parametrize(("family", "tied"), [
    *((family, tied) for family in (*DECODERS, "bert") for tied in (True, False)),
    ("t5", True),  # T5Config accepts nothing else
])
def test_a_head_is_tied_where_one_change_reaches_both(family: str, tied: bool) -> None:
    task = "seq2seq_lm" if family == "t5" else "causal_lm"
    model = tiny(family, task, tie_word_embeddings=tied)
    table = site_table(model)
    embedding = next(s for s in table if s.role == "embedding.tokens")
    head = next(s for s in table if s.role == "head")
    weights = [model.get_parameter(f"{s.module}.weight") for s in (embedding, head)]
    with torch.no_grad():
        weights[0][5] += 1
    assert torch.equal(weights[0][5], weights[1][5]) == (head.tied is not None)
    assert (head.tied is not None) == tied
    if head.tied is not None:
        assert model.get_parameter(f"{head.tied}.weight") is weights[1]
    assert table.frozen_parameters == sum(p.numel() for p in model.parameters())


def test_heads_of_models_that_are_their_own_base_model() -> None:
    t5, bert = tiny_config("t5"), tiny_config("bert")
    assert isinstance(t5, T5Config)
    assert isinstance(bert, BertConfig)
    assert site_table(T5ForQuestionAnswering(t5)).head_modules == ("qa_outputs",)
    encoder = site_table(T5EncoderModel(t5))
    assert (encoder.head_modules, encoder.layers) == ((), {"encoder": 2})
    masked = site_table(BertForMaskedLM(bert))
    assert masked.head_modules == ()
    assert masked.sites[-1].module == "cls.predictions.decoder"


def test_what_peftref_adds_is_not_in_the_table() -> None:
    model = tiny("llama", "causal_lm")
    before = site_table(model)
    inner = model.get_submodule("model.layers.0.mlp.up_proj")
    inner.add_module(ADDED, torch.nn.Linear(32, 4))
    model.add_module(ADDED, torch.nn.Linear(4, 4))
    assert site_table(model) == before


def test_an_unknown_model_type_is_refused_with_what_was_found() -> None:
    model = unlisted()
    with pytest.raises(BackboneError) as caught:
        site_table(model)
    text = str(caught.value)
    for part in ("'fnet' (FNetModel)", "embedding.tokens (embeddings.word_embeddings)",
                 "ffn.up (encoder.layer.*.intermediate.dense)", "--sites",
                 "Roles not recognised: ", "attention.query, attention.key, attention.value",
                 "encoder.layer.*.fourier.output.LayerNorm", "Rows exist for: albert, "):
        assert part in text


def test_an_unknown_model_still_has_its_modules() -> None:
    model = unlisted()
    table = site_table(model, strict=False)
    assert (table.family, table.sites) == ("modules", ())
    assert set(table.modules) == {path for path, _ in model.named_modules() if path}
    sites = select(table, SiteSelector(module=r".*\.intermediate\.dense"))
    assert [s.module for s in sites] == [
        f"encoder.layer.{i}.intermediate.dense" for i in range(2)]
    assert {(s.kind, s.d_in, s.d_out, s.bias) for s in sites} == {(SiteKind.LINEAR, 32, 48, True)}
    with pytest.raises(BackboneError, match="select modules by path"):
        select(table, SiteSelector(select="attention.query"))


@pytest.mark.parametrize(("change", "message"), [
    (("attn.c_proj", "attn.out"), "'attention.output' should be at 'h.0.attn.out'.*c_proj"),
    (("layers: h", "layers: blocks"), "no list of layers at 'blocks'"),
    (("thirds", "gqa, interface: x"), None),
    (("rows: thirds", "rows: halves"), "has 96 rows, which is not what rule 'halves'"),
    (("attention: attn", "attention: {module: attn, interface: attn.self}"), "attends at"),
    (("ffn: mlp", "ffn: {module: mlp, input: {argument: x, module: m}}"), "reads at 'h.0.m'"),
])
def test_a_row_that_does_not_fit_says_where(
    tmp_path: Path, change: tuple[str, str], message: str | None
) -> None:
    source = Path("peftref/backbone/families/gpt2.yaml").read_text(encoding="utf-8")
    assert change[0] in source
    (tmp_path / "row.yaml").write_text(source.replace(*change))
    row = read_family(tmp_path / "row.yaml")
    if message is None:  # with as many key-value heads as heads, gqa is thirds
        kept = site_table(tiny("gpt2"))
        assert site_table(tiny("gpt2"), row) == kept
        return
    with pytest.raises(BackboneError, match=message):
        site_table(tiny("gpt2"), row)


@pytest.mark.parametrize(("change", "message"), [
    (("norms: pre", "norms: middle"), r"row\.yaml:2:8: norms: .* not 'middle'"),
    (("ffn: mlp", "fnn: mlp"), r"row\.yaml:14:12: .*fnn: a role begins with one of attention"),
    (("{c_fc,c_proj}", "{c_fc,c_proj,c_x}"), "2 alternatives, its path 3"),
    (("{c_fc,c_proj}", "{c_fc,c_proj"), "'{' without a '}'"),
    (("norm.ffn: ln_2", "norm.ffn: ln_2\n      attention.key: ln_2"), "given twice"),
    (("layers: h", "layers: ["), "not valid YAML"),
    (("layers: h", "layer_list: h"), "layer_list"),
])
def test_a_malformed_row_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    source = Path("peftref/backbone/families/gpt2.yaml").read_text(encoding="utf-8")
    assert change[0] in source
    (tmp_path / "row.yaml").write_text(source.replace(*change))
    with pytest.raises(SpecError, match=message):
        read_family(tmp_path / "row.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_family(tmp_path / "no.yaml")


def test_all_families_of_the_first_list_have_a_row() -> None:
    assert set(FAMILIES) <= set(families())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_row_rules_are_the_published_layouts(groups: int, share: int, width: int) -> None:
    """Each rule against the reshape that the modelling code applies."""
    heads = groups * share
    query, key = heads * width, groups * width
    interleaved = torch.arange(heads * 3 * width).view(heads, 3, width)
    grouped = torch.arange((heads + 2 * groups) * width).view(groups, share + 2, width)
    falcon = torch.arange((heads + 2) * width).view(heads + 2, width)
    cases = {
        "thirds": torch.arange(3 * query).chunk(3),
        "halves": torch.arange(2 * query).chunk(2),
        "gqa": torch.arange(query + 2 * key).split([query, key, key]),
        "head_interleaved": interleaved.unbind(1),
        "grouped": (grouped[:, :-2], grouped[:, -2], grouped[:, -1]),
        "multi_query": (falcon[:-2], falcon[-2], falcon[-1]),
    }
    for rule, parts in cases.items():
        total = sum(part.numel() for part in parts)
        for i, part in enumerate(parts):
            cut = row_slice(rule, i, total, heads, groups, width)
            assert cut is not None
            assert cut.rows == part.numel()
            assert torch.equal(rows_of(cut), part.reshape(-1))
        assert row_slice(rule, len(parts), total, heads, groups, width) is None

