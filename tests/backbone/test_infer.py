"""Inference, which never sees a row, gives the table of the built-in row or refuses."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from peftref.backbone.hf import inferred_table, site_table
from peftref.backbone.site_table import Site, SiteKind, SiteTable
from peftref.errors import SitesError
from tests.backbone.observe import read_ports
from tests.backbone.tiny import ALL, FAMILIES, OTHERS, inputs, tiny

EVERY = tuple(dict.fromkeys((*ALL, *OTHERS)))
# These are inferred; what is not listed may be refused too, but never inferred wrongly.
INFERRED = {
    *FAMILIES, "bart", "camembert", "cohere", "cohere2", "deit", "electra", "gemma", "gemma2",
    "gemma3_text", "marian", "mbart", "mistral", "olmo2", "opt", "pegasus", "phi", "phi3", "qwen2",
    "smollm3", "starcoder2", "vit", "xlm-roberta", "xlm-roberta-xl"}


def named(table: SiteTable) -> dict[str, Site]:
    """Return the sites by label, without where spans are read: that is compared by value."""
    return {site.label: replace(site, input=None) for site in table}


@pytest.mark.parametrize("family", EVERY)
def test_the_table_of_the_row_is_inferred_without_it_or_refused(family: str) -> None:
    model = tiny(family)
    row = site_table(model)
    if family not in INFERRED:
        with suppress(SitesError):
            assert named(inferred_table(model)) == named(row)
        return
    found = inferred_table(model)
    assert named(found) == named(row)
    assert (found.layers, found.hidden_size, found.vocabulary, found.pre_norm,
            found.head_modules, found.frozen_parameters) == (
        row.layers, row.hidden_size, row.vocabulary, row.pre_norm,
        row.head_modules, row.frozen_parameters)
    spans = [[s for s in table if s.kind in (SiteKind.SPAN, SiteKind.ATTENTION)]
             for table in (found, row)]
    ports = [read_ports(model, own, inputs(family)) for own in spans]
    for label, (read, written) in ports[0].items():
        assert torch.equal(read.flatten(), ports[1][label][0].flatten()), label
        assert torch.equal(written, ports[1][label][1]), label
