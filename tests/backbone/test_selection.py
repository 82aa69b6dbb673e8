"""The pattern language of sites: laws on one side, refusals on the other."""

from __future__ import annotations

import itertools
import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftref.backbone.hf import meta_model, site_table
from peftref.backbone.pattern import expand_braces
from peftref.backbone.selection import select
from peftref.backbone.site_table import Site, SiteTable
from peftref.errors import BackboneError
from peftref.spec.selector import SiteSelector
from peftref.spec.typology import Port
from tests.backbone.tiny import tiny_config

COUNT = 5


@cache
def table(family: str = "bert") -> SiteTable:
    depth = {"t5": "num_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    changes: dict[str, object] = {depth: COUNT}
    if family == "t5":
        changes["num_decoder_layers"] = 3
    return site_table(meta_model(tiny_config(family, **changes), "features"))


def chosen(text: str, family: str = "bert", **rest: object) -> tuple[Site, ...]:
    return select(table(family), SiteSelector.model_validate({"select": text, **rest}))


names = st.text("ab", max_size=2)
tree = st.recursive(names, lambda inner: st.lists(
    st.one_of(inner, st.lists(inner, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=3),
    max_leaves=8)


def written(node: object) -> str:
    """A list is a sequence, a tuple alternatives in braces."""
    if isinstance(node, str):
        return node
    if isinstance(node, tuple):
        return "{" + ",".join(written(each) for each in node) + "}"
    assert isinstance(node, list)
    return "".join(written(each) for each in node)


def meaning(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    if isinstance(node, tuple):
        return [text for each in node for text in meaning(each)]
    assert isinstance(node, list)
    return ["".join(parts) for parts in itertools.product(*map(meaning, node))]


@given(tree)
def test_braces_are_the_product_of_their_alternatives(node: object) -> None:
    assert list(expand_braces(written(node))) == meaning(node)


WORDS = st.lists(st.sampled_from(["query", "key", "value", "output"]), min_size=1, max_size=4)


@given(WORDS)
def test_alternatives_are_a_union_in_execution_order(words: list[str]) -> None:
    roles = {f"attention.{word}" for word in words}
    together = chosen("attention.{" + ",".join(words) + "}")
    assert together == tuple(s for s in table() if s.role in roles)


@given(st.none() | st.integers(-6, 6), st.none() | st.integers(-6, 6),
       st.none() | st.integers(-3, 3).filter(bool))
def test_a_layer_slice_is_pythons(start: int | None, stop: int | None, step: int | None) -> None:
    text = ":".join("" if part is None else str(part) for part in (start, stop))
    text += "" if step is None else f":{step}"
    bounds = [part for part in (start, stop) if part is not None]
    expected = range(COUNT)[start:stop:step]
    if any(abs(bound) > COUNT for bound in bounds) or not expected:
        with pytest.raises(BackboneError, match="5 layers"):
            chosen("ffn", layers=text)
        return
    assert [s.layer for s in chosen("ffn", layers=text)] == sorted(expected)


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=4))
def test_listed_layers_count_from_either_end_and_must_exist(layers: list[int]) -> None:
    try:
        expected = sorted({range(COUNT)[i] for i in layers})
    except IndexError:
        with pytest.raises(BackboneError, match="does not exist"):
            chosen("attention.query", layers=layers)
        return
    assert [s.layer for s in chosen("attention.query", layers=layers)] == expected


def test_a_star_is_any_text_in_a_part_and_alone_any_role() -> None:
    assert chosen("*") == table().sites[:1] + tuple(s for s in table() if s.role != (
        "embedding.tokens"))
    parts = {"attention.query", "attention.key", "attention.value", "attention.output"}
    assert {s.role for s in chosen("attention.*")} == parts
    assert {s.role for s in chosen("norm.*n*")} == {
        "norm.attention", "norm.embedding", "norm.ffn"}
    assert {s.role for s in chosen("norm.a*n")} == {"norm.attention"}
    assert {s.role for s in chosen("*.query")} == {"attention.query"}


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_star_passes_over_sites_without_the_port(family: str) -> None:
    for port in (Port.WEIGHT, Port.INPUT, Port.KEYS_VALUES):
        sites = chosen("*", family, port=port)
        assert sites == tuple(s for s in table(family) if port in s.ports)
        own = {s.role for s in sites}
        assert ("ffn" in own) == (port is Port.INPUT)
        assert ("embedding.tokens" in own) == (port is Port.WEIGHT)
        assert ("attention" in own) == (port is not Port.WEIGHT)
        assert ("residual.ffn" in own) == (port is Port.INPUT)
    biased = chosen("*", port="bias")
    assert {"pooler", "norm.embedding", "attention.key", "ffn.up"} < {s.role for s in biased}
    assert all(s.bias for s in biased)
    assert {"embedding.tokens", "ffn", "residual.ffn", "block"}.isdisjoint(
        s.role for s in biased)


def test_optional_alternatives_may_be_absent() -> None:
    pattern = "{attention,cross_attention?}.{key,value}"
    assert {s.role for s in chosen(pattern)} == {"attention.key", "attention.value"}
    assert {s.role for s in chosen(pattern, "t5")} == {
        f"{span}.{part}" for span in ("attention", "cross_attention")
        for part in ("key", "value")}
    assert chosen("ffn.gate?") == ()
    assert chosen("ffn.up?", "t5", port="bias") == ()


def test_stacks_are_chosen_and_layers_counted_in_each() -> None:
    assert [s.label for s in chosen("ffn", "t5", layers=[-1])] == [
        "encoder.4.ffn", "decoder.2.ffn"]
    assert [s.label for s in chosen("ffn", "t5", layers=[4], stack="encoder")] == [
        "encoder.4.ffn"]


@pytest.mark.parametrize(("family", "selector", "message"), [
    ("bert", {"select": "attention.qeury"}, "Did you mean 'attention.query'.*Available:.*pooler"),
    ("bert", {"select": "{attention,cross_attention}.key"}, "'cross_attention.key'"),
    ("bert", {"select": "expert*"}, r"matches 'expert\*'"),
    ("bert", {"select": "attention.query", "stack": "decoder"}, "in stack encoder .*'decoder'"),
    ("bert", {"select": "embedding.tokens", "layers": [0]}, "outside the layers"),
    ("t5", {"select": "ffn", "layers": [4]}, "layer 4 does not exist in stack 'decoder'.*3 lay"),
    ("t5", {"select": "attention.query", "port": "bias"}, "none has port 'bias'.*output"),
    ("t5", {"select": "*", "port": "bias"}, "none has port 'bias'"),
    ("bert", {"select": "ffn", "port": "weight"}, "'ffn' names 5 sites.*none has port 'weight'"),
    ("bert", {"select": "{ffn,attention}", "port": "keys_values"}, "'ffn' names"),
    ("bert", {"module": "query"}, "matches no whole module path"),
    ("bert", {"module": ".*query", "stack": "decoder"}, "none in stack 'decoder'"),
    ("bert", {"module": ".*query", "port": "keys_values"}, "none has port"),
])
def test_nothing_is_left_out_in_silence(
    family: str, selector: dict[str, object], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        select(table(family), SiteSelector.model_validate(selector))


def test_a_module_pattern_matches_whole_paths_and_knows_their_layer() -> None:
    paths = select(table(), SiteSelector(module=r".*\.intermediate\.dense", layers="::2"))
    assert [(s.role, s.layer) for s in paths] == [
        (f"module:encoder.layer.{i}.intermediate.dense", i) for i in (0, 2, 4)]
    pattern = re.compile(r"encoder\.layer\.1\..*")
    inside = select(table(), SiteSelector(module=pattern.pattern))
    assert {s.module for s in inside} == {p for p in table().modules if pattern.fullmatch(p)}
