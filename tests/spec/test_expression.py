"""Techniques as one line of text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftref.errors import SpecError
from peftref.spec import load, parameters
from peftref.spec.composition import CompositionSpec
from peftref.spec.expression import Coupled, Use, format_expression, parse_expression

NAMES = st.sampled_from(["lora", "ia3", "prefix_tuning", "mam"])
VALUES = st.one_of(
    st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.integers(), max_size=3).map(tuple),
)
ARGUMENTS = st.dictionaries(st.sampled_from(["rank", "site", "keep", "lora.rank"]), VALUES)
USES = st.builds(Use, NAMES, ARGUMENTS) | st.builds(
    Use, st.sampled_from(["a.yaml", "../b c/it's.yaml"]), ARGUMENTS, st.just(value=True))


def coupled(terms: st.SearchStrategy[Use | Coupled]) -> st.SearchStrategy[Coupled]:
    some = st.lists(terms, min_size=1, max_size=3).map(tuple)
    return st.builds(Coupled, st.sampled_from(["mix", "prune", "gate"]), some, ARGUMENTS)


TERMS = st.lists(st.recursive(USES, coupled, max_leaves=4), min_size=1, max_size=3).map(tuple)


@given(TERMS)
def test_what_is_written_is_read_back(terms: tuple[Use | Coupled, ...]) -> None:
    assert parse_expression(format_expression(terms)) == terms


@given(st.text(st.sampled_from("lora ia3+(),='*.{}[]:1\n#\\\"")) | st.text())
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    with suppress(SpecError):
        assert isinstance(load(text), CompositionSpec)


@pytest.mark.parametrize(("text", "column", "part"), [
    ("lora + lra", 8, "Did you mean 'lora'?"),
    ("lora(rank=4) + ia3(layers=lora)", 27, "must be 'all'"),
    ("lora(rank=4, rank=5)", 19, "given twice"),
    ("lora(rank={1})", 11, "is no value"),
    ("ia3 + lora(8)", 12, "lora takes values by name: lora(parameter=8)"),
    ("ia3 + lora(ia3)", 7, "'lora' is a technique, not a coupling"),
    ("ia3 + lora.rank", 7, "is no technique"),
    ("ia3 - lora", 1, "is no technique"),
    ("ia3 + (lora", 7, "not a technique expression"),
    ("lora(**{1: 2})", 8, "'**' takes a literal"),
    ("mix(lora, members=['lora'])", 1, "positional arguments"),
    ("lora if ia3 else mam", 1, "is no technique"),
    ("(lambda: lora)()", 1, "is no technique"),
])
def test_the_column_of_a_mistake(text: str, column: int, part: str) -> None:
    with pytest.raises(SpecError) as raised:
        load(text)
    assert str(raised.value).startswith(f"<{text}>:1:{column}: ")
    assert part in str(raised.value)


def shape(spec: CompositionSpec) -> list[tuple[str, str]]:
    return [(member.name, member.technique.technique) for member in spec.members]


def couplings(spec: CompositionSpec) -> list[tuple[str, tuple[str, ...], Mapping[str, object]]]:
    return [(c.name, c.members, dict(c.arguments)) for c in spec.couplings]


def test_members_of_one_technique_are_numbered() -> None:
    spec = load("lora + ia3 + lora(rank=2)", **{"lora.rank": 4, "lora_2.alpha": 3})
    assert shape(spec) == [("lora", "lora"), ("ia3", "ia3"), ("lora_2", "lora")]
    assert [m.technique.values.get("rank") for m in spec.members] == [4, None, 2]
    assert spec.members[2].technique.values["alpha"] == 3.0


def test_couplings_nest_inner_first() -> None:
    spec = load("prune(mix(lora, ia3, copies=4), bitfit, keep=0.5) + gate(lora)")
    assert couplings(spec) == [
        ("mix", ("lora", "ia3"), {"copies": 4}),
        ("prune", ("lora", "ia3", "bitfit"), {"keep": 0.5}),
        ("gate", ("lora_2",), {}),
    ]
    assert load("gate(lora + ia3)").couplings == load("gate(lora, ia3)").couplings


def test_a_composition_is_a_term() -> None:
    spec = load("lora + unipelt(rank=2) + adamix", **{"unipelt.lora.dropout": 0.25, "lora.rank": 3})
    assert [name for name, _ in shape(spec)] == [
        "lora", "adapter", "prefix", "lora_2", "adapter_2"]
    assert spec.members[0].technique.values["rank"] == 3
    assert spec.members[3].technique.values["rank"] == 2
    assert spec.members[3].technique.values["dropout"] == 0.25
    assert [c[:2] for c in couplings(spec)] == [
        ("gate", ("adapter", "prefix", "lora_2")), ("mix", ("adapter_2",))]
    assert [procedure.name for procedure in spec.procedures] == ["consistency"]


def test_a_technique_can_be_a_value() -> None:
    spec = load("sparse_adapter(base=lora(rank=2) + ia3, keep=0.5)", **{"base.ia3.layers": "0:2"})
    assert shape(spec) == [("base_lora", "lora"), ("base_ia3", "ia3")]
    assert couplings(spec)[0][1] == ("base_lora", "base_ia3")
    assert spec.members[1].technique.values["layers"] == "0:2"
    nested = load("sparse_adapter(base='mix(lora, copies=3)')")
    assert couplings(nested)[0] == ("mix", ("base",), {"copies": 3})
    assert couplings(nested)[1][:2] == ("prune", ("base",))


def test_a_raw_module_pattern_is_a_site() -> None:
    site = load(r"lora(site='module:.*\.q_proj')").members[0].technique.modules[0].site
    assert (site.module, site.select) == (r".*\.q_proj", None)


def test_a_compositions_rate_replaces_its_members() -> None:
    alone, inside = load("lora").members[0].technique, load("adamix_lora").members[0].technique
    assert alone.learning_rate is not None
    assert inside.learning_rate is not None
    assert (alone.learning_rate.default, inside.learning_rate.default) == (5e-4, 2e-4)


def test_what_can_be_set_is_what_load_takes() -> None:
    for source in ("lora", "mam", "lora + mix(unipelt, copies=2)", "sparse_adapter(base=dora)"):
        known = parameters(source)
        assert known
        defaults = {name: parameter.default for name, parameter in known.items()}
        assert load(source, **defaults) == load(source)
    assert parameters("adamix_lora")["alpha"].default == 32.0
    assert "lora.alpha" not in parameters("adamix_lora")
    assert parameters("adamix_lora", **{"lora.dropout": 0.5})["lora.dropout"].default == 0.5
