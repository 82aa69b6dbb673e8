"""Spans: what a sub-layer reads, what it adds to the stream, and where the sum is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from peftref.backbone.hf import site_table
from peftref.backbone.site_table import SiteKind
from tests.backbone.observe import read_ports, written
from tests.backbone.test_probe import VARIANTS
from tests.backbone.tiny import inputs, tiny

SPANS = ("attention", "cross_attention", "ffn", "mixer")


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_spans_a_block_is_its_residual_path(variant: str) -> None:
    """The spans together are all that a layer adds: without them, x (pre), norm(norm(x)) (post)."""
    family, changes = VARIANTS[variant]
    model, batch = tiny(family, **changes), inputs(family)
    table = site_table(model)
    spans = [s for s in table if s.role in SPANS]
    watched = [s for s in table if s.role in ("block", "residual.ffn")]
    with written(model, spans, 0.0):
        ports = read_ports(model, watched, batch)
    for stack, count in table.layers.items():
        for i in range(count):
            read, write = ports[f"{stack}.{i}.block"]
            summed = ports.get(f"{stack}.{i}.residual.ffn", (read, write))  # none in Mamba
            if table.pre_norm:
                assert torch.equal(read, write)
                assert torch.equal(summed[1], write)
                continue
            norms = {s.role: model.get_submodule(s.module) for s in table
                     if (s.stack, s.layer) == (stack, i) and s.kind is SiteKind.NORM}
            with torch.no_grad():
                inner = norms["norm.attention"](read)
                if "norm.cross_attention" in norms:
                    inner = norms["norm.cross_attention"](inner)
                assert torch.equal(norms["norm.ffn"](inner), write)
            assert torch.equal(summed[0], inner)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_input_of_a_span_is_what_its_projections_read_and_the_stream_adds(
    variant: str
) -> None:
    family, changes = VARIANTS[variant]
    model, batch = tiny(family, **changes), inputs(family)
    table = site_table(model)
    ports = read_ports(model, table.sites, batch)
    reader = {"attention": "attention.query", "cross_attention": "cross_attention.query",
              "ffn": "ffn.up", "mixer": "mixer.input"}
    if "attention.query_latent" in table.roles():
        reader["attention"] = "attention.query_latent"
    for site in table:
        if site.role not in SPANS:
            continue
        place = f"{site.stack}.{site.layer}"
        read, write = ports[site.label]
        first = ports.get(f"{place}.{reader[site.role]}")  # experts are no modules
        assert torch.equal(read, first[0] if first else ports[f"{place}.norm.ffn"][1])
        norm = ports.get(f"{place}.norm.{site.role}")
        if norm is None and "norm.attention" in table.roles():  # one norm feeds both
            norm = ports.get(f"{place}.norm.attention")
        if norm is None:  # what the stream holds is read as it is
            assert site.role == "ffn" or torch.equal(read, ports[f"{place}.block"][0])
        elif table.pre_norm:
            assert torch.equal(read, norm[1])
        else:
            assert torch.equal((write + read).view_as(norm[0]), norm[0])  # OPT flattens
    for stack, count in table.layers.items():
        for i in range(count - 1):
            here, following = ports[f"{stack}.{i}.block"], ports[f"{stack}.{i + 1}.block"]
            if variant != "albert-groups":  # where a layer runs again before the next one
                assert torch.equal(here[1], following[0])
        last = ports[f"{stack}.{count - 1}.block"][1]
        if table.pre_norm and family != "beit":  # which norms the mean of the patches
            final = ports[f"{stack}.norm.final"][0]
            assert torch.equal(final, last[:, 0] if stack == "vision" else last)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_enclosing_module_hands_its_first_argument_on(family: str) -> None:
    model, batch = tiny(family), inputs(family)
    for site in site_table(model):
        if site.role in SPANS:
            assert site.input is not None
            seen: list[torch.Tensor] = []

            def note(_module: nn.Module, args: tuple[torch.Tensor, ...],
                     seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0])

            hooks = [model.get_submodule(path).register_forward_pre_hook(note)
                     for path in (site.input.module, site.module)]
            model(**batch)
            for hook in hooks:
                hook.remove()
            assert len(seen) == 2
            assert seen[0] is seen[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_are_unique_and_each_layer_has_the_same_roles(variant: str) -> None:
    family, changes = VARIANTS[variant]
    table = site_table(tiny(family, **changes))
    assert max(Counter(site.label for site in table).values()) == 1
    for stack, count in table.layers.items():
        per_layer = [[s.role for s in table if (s.stack, s.layer) == (stack, i)]
                     for i in range(count)]
        if family == "modernbert":  # the embeddings end with the norm of the first layer
            per_layer[0].insert(0, "norm.attention")
        if family == "deepseek_v3":  # the first layer is dense
            mixture = ("router", "experts.gate", "experts.up", "experts.down")
            per_layer[1] = [role for role in per_layer[1] if role not in mixture]
        assert per_layer == [per_layer[0]] * count
