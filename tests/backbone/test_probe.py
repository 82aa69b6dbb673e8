"""Every role is the place that it says: changed there, seen exactly where it must be seen."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, OPTConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2 import modeling_dinov2

from peftref.backbone.family import read_family
from peftref.backbone.hf import site_table
from peftref.backbone.site_table import Site, SiteKind, SiteTable
from tests.backbone.observe import forward, perturbed, read_ports, rows_of
from tests.backbone.tiny import ALL, TWO_STACKS, inputs, tiny

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ALL},
    "falcon-7b": ("falcon", {"new_decoder_architecture": False}),
    "falcon-rw": ("falcon", {"new_decoder_architecture": False, "multi_query": False,
                             "num_kv_heads": 4, "parallel_attn": False, "alibi": True}),
    "falcon-one-norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "cohere-plain": ("cohere", {"use_qk_norm": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False}),
    "phi-normed": ("phi", {"qk_layernorm": True}),
    "albert-groups": ("albert", {"num_hidden_groups": 2, "num_hidden_layers": 4}),
    "beit-cls": ("beit", {"use_mean_pooling": False}),
    # Before, up and gate were one linear of a name of its own, which the row does not know.
    **({"dinov2-gated": ("dinov2", {"use_swiglu_ffn": True})} if "gate_proj" in inspect.getsource(
        modeling_dinov2) else {}),
    "deberta-unshared": ("deberta-v2", {"share_att_key": False}),
    "deberta-absolute": ("deberta-v2", {"relative_attention": False, "pos_att_type": None,
                                        "position_biased_input": True}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
}
PARTS = ("query", "key", "value", "output")
OPT_ROW = """
families: [opt]
norms: {do_layer_norm_before: pre, otherwise: post}
stacks:
  decoder:
    layers: decoder.layers
    before: {embedding.tokens: decoder.embed_tokens}
    layer:
      norm.attention: self_attn_layer_norm
      "attention.{query,key,value,output}": "self_attn.{q_proj,k_proj,v_proj,out_proj}"
      attention: {module: self_attn, input: {argument: hidden_states}}
      norm.ffn: final_layer_norm
      "ffn.{up,down}": "{fc1,fc2}"
    after: {norm.final?: decoder.final_layer_norm}
"""


Seen = dict[int, tuple[Any, ...]]


@contextmanager
def attended(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, table: SiteTable
) -> Generator[Seen]:
    """Collect query, key and value of the first call by the identity of the module that attends.

    Families without an attention interface show what they store in the cache, hence no query;
    DeBERTa splits the three into heads one after the other.
    """
    seen: Seen = {}
    paths = {s.layer: s.attention.interface for s in table
             if s.attention is not None and s.attention.cache is not None}

    def spy(real: Any) -> Any:
        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: object,
                   **kwargs: object) -> object:
            seen.setdefault(id(module), (q.clone(), k.clone(), v.clone()))
            return real(module, q, k, v, *args, **kwargs)
        return attend

    def update(cache: DynamicCache, k: Tensor, v: Tensor, layer: int, *args: object) -> object:
        if layer in paths:
            seen[id(model.get_submodule(str(paths[layer])))] = (None, k.clone(), v.clone())
        return store(cache, k, v, layer, *args)

    def split(module: nn.Module, x: Tensor, heads: int) -> Tensor:
        parts = cut(module, x, heads)
        seen[id(module)] = (*seen.get(id(module), ()), parts.unflatten(0, (-1, heads)).clone())
        return parts

    store = DynamicCache.update
    file = sys.modules[type(model).__module__]
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        if hasattr(file, "eager_attention_forward"):
            patch.setattr(file, "eager_attention_forward", spy(file.eager_attention_forward))
        patch.setattr(DynamicCache, "update", update)
        if hasattr(file, "DisentangledSelfAttention"):
            cut = file.DisentangledSelfAttention.transpose_for_scores
            patch.setattr(file.DisentangledSelfAttention, "transpose_for_scores", split)
        yield seen


def probe_rows(model: PreTrainedModel, table: SiteTable, batch: dict[str, Tensor],
               monkeypatch: pytest.MonkeyPatch) -> int:
    """Change each attention role in turn; return how many were probed."""
    spans = {(s.stack, s.layer, s.role): s for s in table if s.kind is SiteKind.ATTENTION}
    probed = 0
    if any(s.attention is not None and s.attention.cache is not None for s in table):
        model.config.use_cache = True
    with attended(monkeypatch, model, table) as seen:
        forward(model, batch)
        before = dict(seen)
        for site in table:
            owner = site.role.rpartition(".")[0].replace("norm", "attention")
            span = spans.get((site.stack, site.layer, owner))
            if span is None or site.role.rpartition(".")[2] not in PARTS:
                continue
            shape = span.attention
            assert shape is not None
            assert shape.interface is not None
            interface = id(model.get_submodule(shape.interface))
            q, k, v = before[interface][:3]
            stored = shape.heads if table.family == "falcon" else shape.key_value_heads
            assert k.shape[1] == v.shape[1]
            assert k.shape[1] in (stored, shape.key_value_heads)
            assert k.shape[3] == shape.head_width
            assert v.shape[3] == (shape.value_width or shape.head_width)
            if q is not None:
                assert (q.shape[1], q.shape[3]) == (shape.heads, shape.head_width)
            seen.clear()
            with perturbed(model, site):
                forward(model, batch)
            part = PARTS.index(site.role.rpartition(".")[2])
            for i, new in enumerate(seen[interface][:3]):
                old = before[interface][i]
                if new is None:
                    continue
                columns = (new != old).any(0).any(1)
                if table.family == "deepseek_v3" and i == 1:  # the rest comes with the latent
                    columns = columns[..., :model.config.qk_nope_head_dim]
                assert bool(columns.all() if i == part else not columns.any()), (site.label, i)
            probed += 1
    return probed


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_named_part_of_the_attention_changes(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = VARIANTS[variant]
    model = tiny(family, **changes)
    table = site_table(model)
    attentions = sum(s.kind is SiteKind.ATTENTION for s in table)
    if family in ("mamba", "mamba2"):
        assert attentions == 0
        return
    stacks = 3 if family in TWO_STACKS else len(table.layers)  # a decoder's layer has two
    assert attentions == stacks * next(iter(table.layers.values()))
    roles = 6 if "norm.query" in table.roles() else 4
    assert probe_rows(model, table, inputs(family), monkeypatch) == roles * attentions


def test_a_row_of_the_user_reads_a_family_that_no_built_in_row_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opt.yaml").write_text(OPT_ROW)
    torch.manual_seed(0)
    model = AutoModel.from_config(OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32)).eval()
    table = site_table(model, read_family(tmp_path / "opt.yaml"))
    assert table.family == "opt"
    assert table.pre_norm
    assert probe_rows(model, table, inputs("llama"), monkeypatch) == 8


@pytest.mark.parametrize("family", ALL)
def test_causal_says_whether_a_token_sees_what_follows(family: str) -> None:
    model, batch = tiny(family), inputs(family)
    table = site_table(model)
    for stack in table.layers:
        ends = stack == "decoder" and family in TWO_STACKS
        key = "decoder_input_ids" if ends else next(iter(batch))
        key = "pixel_values" if stack == "vision" else key
        last = [s for s in table if s.role == "block" and s.stack == stack][-1:]
        plain = read_ports(model, last, batch)[last[0].label][1]
        ids = batch[key].clone()
        ids[..., -1] += 1
        if not ids.is_floating_point():
            ids %= 97
        other = read_ports(model, last, {**batch, key: ids})[last[0].label][1]
        sees = bool((plain[:, 0] != other[:, 0]).any())
        spans = [s.attention for s in table if s.role == "attention" and s.stack == stack]
        assert {span.causal for span in spans if span} <= {not sees}
        assert spans or (family in ("mamba", "mamba2") and not sees)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ffn_roles_change_the_ffn_alone_and_up_is_the_linear_branch(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model, batch = tiny(family, **changes), inputs(family)
    table = site_table(model)
    layer0 = [s for s in table if s.layer == 0]
    spans = [s for s in layer0 if s.role in ("ffn", "attention")]
    before = read_ports(model, spans, batch)
    for site in layer0:
        if not site.role.startswith("ffn."):
            continue
        own = f"{site.stack}.0.ffn"
        with perturbed(model, site):
            after = read_ports(model, spans, batch)
        assert not torch.equal(after[own][1], before[own][1])
        assert torch.equal(after[own][0], before[own][0])
        if any(s.role == "ffn.gate" for s in layer0):
            doubled = _scaled_ffn(model, site, spans, batch)[own][1]
            down = next(s for s in layer0 if (s.stack, s.role) == (site.stack, "ffn.down"))
            bias = dict(model.named_parameters()).get(f"{down.module}.bias")
            rest = torch.zeros(()) if bias is None else bias.detach()
            linear = torch.allclose(doubled - rest, 2 * (before[own][1] - rest), atol=1e-4)
            assert linear == (site.role != "ffn.gate"), site.label


def _scaled_ffn(model: PreTrainedModel, site: Site, spans: list[Site], batch: dict[str, Tensor]
                ) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the spans while the linear of ``site`` puts out twice its product (and bias)."""
    tensors = [p for name, p in model.get_submodule(site.module).named_parameters()
               if name == "weight" or site.role != "ffn.down"]
    rows = slice(None) if site.rows is None else rows_of(site.rows)
    with torch.no_grad():
        for tensor in tensors:
            (tensor.T if site.transposed and tensor.dim() == 2 else tensor)[rows] *= 2
        ports = read_ports(model, spans, batch)
        for tensor in tensors:
            (tensor.T if site.transposed and tensor.dim() == 2 else tensor)[rows] /= 2
    return ports


@pytest.mark.parametrize("family", ALL)
def test_norms_embeddings_and_pooler_reach_the_output_and_widths_are_real(family: str) -> None:
    model, batch = tiny(family), inputs(family)
    table = site_table(model)
    with torch.no_grad():
        before = [part.clone() for part in model(**batch).values() if isinstance(part, Tensor)]
    ports = read_ports(model, [s for s in table if s.role != "embedding.tokens"], batch)
    for site in table:
        if site.label in ports:
            read, write = ports[site.label]
            whole = write.shape[-1] if site.rows is None else site.rows.rows
            if site.kind is not SiteKind.MATRIX:  # these are no streams of their module
                assert (read.shape[-1], whole) == (site.d_in, site.d_out), site.label
        if site.role.startswith(("norm.", "embedding.", "pooler")):
            with perturbed(model, site), torch.no_grad():
                after = [p for p in model(**batch).values() if isinstance(p, Tensor)]
            pairs = zip(before, after, strict=True)
            assert any(not torch.equal(old, new) for old, new in pairs), site.label
    norms = {s.module for s in table if s.role.startswith("norm.")}
    in_model = {path for path, m in model.named_modules() if "Norm" in type(m).__name__}
    assert norms == in_model
