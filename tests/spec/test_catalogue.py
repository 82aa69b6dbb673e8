"""The shipped catalogue, and catalogues of users."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.errors import SpecError
from peftref.spec import load, parameters, to_yaml
from peftref.spec.catalogue import Entry, entries
from peftref.spec.composition import CompositionSpec
from peftref.spec.loader import parse_yaml, plain
from peftref.spec.parameter import Parameter
from peftref.spec.technique import Expression

SHIPPED = {name: entry for name, entry in entries().items() if entry.shipped}
LOADABLE = [name for name, entry in SHIPPED.items() if entry.kind != "macro"]
TECHNIQUES = {"lora", "rslora", "dora", "ia3", "bitfit", "ln_tuning", "houlsby_adapter",
              "pfeiffer_adapter", "scaled_parallel_adapter", "prefix_tuning", "prompt_tuning",
              "loha", "lokr", "oft", "vera"}
COMPOSITIONS = {"mam", "unipelt", "adamix", "adamix_lora", "sparse_adapter", "large_sparse"}


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the catalogue of whoever runs the tests out of them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PEFTREF_CATALOGUE", raising=False)


def leaves(function: Expression) -> Iterator[Expression]:
    if function.children:
        for child in function.children:
            yield from leaves(child)
    else:
        yield function


def test_the_catalogue_is_complete() -> None:
    assert {n for n, e in SHIPPED.items() if e.kind == "technique"} >= TECHNIQUES
    assert {n for n, e in SHIPPED.items() if e.kind == "composition"} >= COMPOSITIONS


@pytest.mark.parametrize("entry", SHIPPED.values(), ids=lambda entry: entry.name)
def test_a_file_is_a_page_with_its_sources(entry: Entry) -> None:
    text = entry.path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert entry.path.stem == entry.name == entry.template.name
    body = plain(parse_yaml(text, "spec"))
    assert body["reference"]["url"].startswith("https://")
    assert entry.kind == "macro" or "learning_rate" in body


@pytest.mark.parametrize("name", LOADABLE)
def test_every_member_has_a_cited_rate_in_its_range(name: str) -> None:
    for member in load(name).members:
        rate = member.technique.learning_rate
        assert rate is not None
        assert rate.source
        assert rate.range is not None
        assert rate.range[0] <= rate.default <= rate.range[1]


def round_trip(spec: CompositionSpec) -> None:
    text = to_yaml(spec)
    assert load(text) == spec
    assert to_yaml(load(text)) == text
    assert load(spec.model_dump(mode="json")) == spec
    assert load(spec) is spec


@pytest.mark.parametrize("name", LOADABLE)
def test_yaml_spec_yaml_spec(name: str) -> None:
    spec = load(name)
    round_trip(spec)
    technique = spec.members[0].technique
    assert load(technique.model_dump(mode="json")) == CompositionSpec.of(technique)


def value_of(parameter: Parameter) -> st.SearchStrategy[object]:
    low, high = parameter.range or (0, 2**16)
    match parameter.type:
        case "int":
            return st.integers(math.ceil(low), math.floor(high))
        case "float":
            return st.floats(low, high)
        case "bool":
            return st.booleans()
        case "choice":
            return st.sampled_from(parameter.choices or ())
        case "layers":
            return st.one_of(st.just("all"), st.just("0:6:2"),
                             st.lists(st.integers(-8, 8), min_size=1, max_size=3))
        case "site":
            return st.sampled_from(["attention.*", "{ffn,attention}.{up?,query}", "module:.*q$"])
        case "technique":
            return st.sampled_from(["lora(rank=3)", "mam", "lora + mix(ia3, copies=2)"])
        case "text":
            return st.sampled_from(["zeros", "normal(0.5)", "2", "true", "", "a: b #c", "$1"])


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(LOADABLE))
def test_every_allowed_value_is_taken_and_round_trips(data: st.DataObject, name: str) -> None:
    own = entries()[name].template.parameters
    chosen = data.draw(st.sets(st.sampled_from(sorted(own)), max_size=4))
    values = {key: data.draw(value_of(own[key]), label=key) for key in chosen}
    inactive = values.get("reparameterisation") == "none" or "reparameterisation" not in values
    if name == "prefix_tuning" and inactive:
        values.pop("hidden", None)  # it would have no effect, which is an error
    if values.get("reparameterisation") == "mlp":
        values.pop("init", None)
    spec = load(name, **values)
    for key, value in values.items():
        assert spec.values[key] == (tuple(value) if isinstance(value, list) else value)
    round_trip(spec)
    assert load(name, **dict(spec.values)) == spec


@given(rank=st.integers(1, 1024), alpha=st.floats(0.01, 4096))
def test_scales_are_the_published_formulas(rank: int, alpha: float) -> None:
    def scale(name: str) -> float | None:
        modules = load(name, rank=rank, alpha=alpha).members[0].technique.modules
        return modules[0].interaction.integration.scale

    assert scale("lora") == scale("dora") == scale("loha") == alpha / rank
    assert scale("rslora") == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)


@given(bottleneck=st.integers(1, 512), factor=st.integers(2, 16))
def test_large_sparse_keeps_as_many_as_the_dense_adapter(bottleneck: int, factor: int) -> None:
    spec = load("large_sparse", bottleneck=bottleneck, factor=factor)
    keep = spec.couplings[0].arguments["keep"]
    width = spec.members[0].technique.values["bottleneck"]
    assert isinstance(width, int)
    assert isinstance(keep, float)
    assert width * keep == pytest.approx(bottleneck, rel=1e-12)


@pytest.mark.parametrize("name", LOADABLE)
def test_tensors_of_a_module_have_names_of_their_own(name: str) -> None:
    trained = {"linear", "vector", "tokens", "frozen", "bias", "kron", "rotation", "delta"}
    for member in load(name).members:
        for module in member.technique.modules:
            names = [leaf.arguments.get("name", leaf.name)
                     for leaf in leaves(module.function) if leaf.name in trained]
            assert len(names) == len(set(names))


def write(path: Path, name: str, kind: str = "technique") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = SHIPPED["lora"].path.read_text(encoding="utf-8")
    path.write_text(body.replace("technique: lora", f"{kind}: {name}"), encoding="utf-8")
    return path


def test_a_users_folder_works_like_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "mine" / "deep" / "any.yaml", "mine")
    write(tmp_path / "config" / "peftref" / "catalogue" / "yours.yml", "yours")
    macro = tmp_path / "mine" / "double.yaml"
    macro.write_text("macro: double\nfunction: [{low_rank: {name: a}}, {low_rank: {name: b}}]\n")
    user = tmp_path / "mine" / "user.yaml"
    user.write_text("technique: user\nmodules: [{name: m, site: {select: ffn}, function: double, "
                    "interaction: {insertion: parallel, integration: add}}]\n")
    monkeypatch.setenv("PEFTREF_CATALOGUE", f"{tmp_path / 'mine'}")
    spec = load("prune(mine(rank=3), keep=0.5) + yours + user")
    assert [member.name for member in spec.members] == ["mine", "yours", "user"]
    function = spec.members[2].technique.modules[0].function
    names = [leaf.arguments["name"] for leaf in leaves(function)]
    assert names == ["a.down", "a.up", "b.down", "b.up"]
    assert "yours.rank" in parameters("yours + mine")
    round_trip(spec)


def test_no_file_shadows_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a" / "lora.yaml", "lora")
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path / "a"))
    with pytest.raises(SpecError, match="already defined") as raised:
        load("ia3")
    assert str(path) in str(raised.value)
    assert str(SHIPPED["lora"].path) in str(raised.value)


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path / "nowhere"))
    with pytest.raises(SpecError, match="nowhere"):
        entries()


def test_a_broken_file_hurts_only_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken.yaml").write_text("technique: broken\nmodules: [\n")
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path))
    assert load("lora").members
    with pytest.raises(SpecError, match=r"broken\.yaml:3:1"):
        load("broken")


def test_the_language_starts_without_torch() -> None:
    program = ("import sys; from peftref.spec import load; load('mam'); "
               "from peftref.spec.schema import json_schema; json_schema('technique'); "
               "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))")
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
