"""What a wrong file or value is answered with: place, rule, what was found, what is valid."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.errors import SpecError
from peftref.spec import load, to_yaml

GOOD = """\
technique: mine
parameters:
  rank: {type: int, default: 8, range: [1, 64]}
modules:
  - name: delta
    site: {select: attention.query}
    function: {low_rank: {rank: $rank}}
    interaction: {insertion: parallel, integration: {kind: scaled_add, scale: "${16 / rank}"}}
"""
CASES = [
    ("insertion:", "insertoin:", "8:19", "Did you mean 'insertion'?"),
    ("insertion: parallel", "insertion: paralel", "8:30", "'sequential' or 'parallel'"),
    ("select:", "selct:", "6:12", "Did you mean 'select'?"),
    ("modules:", "moduls:", "4:1", "Did you mean 'modules'?"),
    ("range:", "rnge:", "3:33", "Did you mean 'range'?"),
    ("default: 8", "default: 80", "3:9", "must be from 1 to 64, not 80"),
    ("default: 8", "default: eight", "3:9", "must be an integer, not 'eight'"),
    ("type: int", "type: integer", "3:16", "'int', 'float'"),
    ("$rank", "$rnk", "7:33", "Did you mean 'rank'?"),
    ("  rank:", "  size: {type: int, default: 1}\n  rank:", "3:3", "'size' is declared and never"),
    ("{rank: $rank}", "{rnk: $rank}", "7:32", "Did you mean 'rank'?"),
    ("$rank}}\n", "$rank, dropout: 3}}\n", "7:49", "must be from 0 to 0.99, not 3.0"),
    ("16 / rank", "16 / (rank - 8)", "8:79", "divides by zero"),
    ("16 / rank", "16 / ", "8:79", "is not an arithmetic expression"),
    ("16 / rank", "rank.real", "8:79", "'rank.real' is not allowed in arithmetic"),
    ("16 / rank", "2 ** rank ** 3", "8:79", "an exponent is at most 64"),
    ("scaled_add", "add", "8:53", "'scale' goes with kind 'scaled_add'"),
    ("    site:", "    name: delta\n    site:", "6:5", "duplicate key 'name'; first at"),
    ("{low_rank: {rank: $rank}}", "{low_rank: [linear, $rank]}", "7:15", "takes a mapping"),
    ("{low_rank: {rank: $rank}}", "{chain: {rank: $rank}}", "7:15", "takes a list of functions"),
    ("{low_rank: {rank: $rank}}", "[linear, {sum: []}, $rank]", "7:24", "at least one function"),
    ("{low_rank: {rank: $rank}}", "{choose: {by: $rank, 7: linear}}", "7:24", "no branch '8'"),
    ("attention.query", "attention..query", "6:11", "is no site pattern"),
    ("attention.query}", "attention.query, layers: some}", "6:11", "a slice such as '0:6:2'"),
    ("attention.query", "&a ffn", "6:20", "anchors and aliases are not accepted"),
    ("  - name: delta\n", "  - nme: delta\n", "5:5", "Did you mean 'name'?"),
    ("  - name: delta\n    site", "  - site", "5:5", "field 'name' is missing in modules[0]"),
]


@pytest.mark.parametrize(("old", "new", "place", "part"), CASES)
def test_a_mistake_in_a_file(old: str, new: str, place: str, part: str, tmp_path: Path) -> None:
    assert old in GOOD
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SpecError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}:{place}: ")
    assert part in str(raised.value)
    assert raised.value.mark is not None


def laughs(levels: int) -> str:
    lines = ["l0: &l0 [lol, lol]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(("text", "part"), [
    ("technique: a\nx: [1, .inf]\n", "<text>:2:8: a number is finite"),
    (laughs(64), "<text>:1:5: anchors and aliases"),
    ("y: 1\nx: " + "[" * 60 + "]" * 60, "nested deeper than 40 levels"),
    ("[\n" * 9000, "nested deeper than 40 levels"),
    ("y: 1\nx: " + "a" * (1 << 18), "larger than"),
    ("- 1\n- 2\n", "<text>:1:1: a document is a mapping"),
    ("# nothing\n\n#", "the document is empty"),
    ("technique: !!python/object/apply:os.getcwd []\nx: 1\n", "<text>:1:12"),
    ("technique: a\n\tmodules: b\n", "<text>:2:1: not valid YAML"),
    ("technique: a\nmacro: b\n", "found technique, macro"),
    ("? [a, b]\n: c\nd: e\n", "<text>:1:3: a key is plain text"),
])
def test_a_text_that_is_no_spec(text: str, part: str) -> None:
    with pytest.raises(SpecError) as raised:
        load(text)
    assert part in str(raised.value)


@pytest.mark.parametrize(("source", "values", "part"), [
    ("lora", {"rank": "4"}, "lora: parameter 'rank' must be an integer, not '4'"),
    ("lora", {"rank": True}, "must be an integer, not True"),
    ("lora", {"rank": 0}, "must be from 1 to 1024, not 0"),
    ("lora", {"dropout": float("nan")}, "must be a number, not nan"),
    ("lora", {"layers": []}, "must be 'all', a list of layer indices"),
    ("lora", {"site": "attention.{query"}, "must be a site pattern"),
    ("lora", {"rnk": 4}, "Unknown parameter of lora 'rnk'. Did you mean 'rank'?"),
    ("lora + ia3", {"rank": 4}, "Did you mean 'lora.rank'?"),
    ("lora + ia3", {"lora_2.rank": 4}, "Unknown parameter of lora + ia3 'lora_2.rank'"),
    ("mam", {"botleneck": 4}, "Did you mean 'bottleneck'?"),
    ("mam", {"ffn.bottleneck": 4}, "computed by the composition from '$bottleneck'"),
    ("prefix_tuning", {"hidden": 100}, "hidden=100 has no effect"),
    ("prefix_tuning", {"reparameterisation": "lstm"}, "must be one of none, mlp; not 'lstm'"),
    ("sparse_adapter", {"base": "lra"}, "sparse_adapter.yaml:11:10: Unknown technique"),
    ("nowhere.yaml", {}, "nowhere.yaml: cannot be read"),
])
def test_a_value_that_does_not_fit(source: str, values: dict[str, object], part: str) -> None:
    with pytest.raises(SpecError) as raised:
        load(source, **values)
    assert part in str(raised.value)


PIECES = st.sampled_from(["$rank", "${", "}", "{", "[", "]", ": ", "\n", "  ", "- ", "null", "3",
                          "'", "\t", "?", "!!x", "|", "&a", "*a", "choose", "by", "", "modules"])


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 8), PIECES), max_size=3))
def test_any_damage_is_a_spec_or_a_spec_error(edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length:]
    with suppress(SpecError):
        spec = load(text)
        assert load(to_yaml(spec)) == spec


def test_a_resolved_spec_takes_no_values() -> None:
    with pytest.raises(SpecError, match="resolved"):
        load(load("lora"), rank=4)


def test_circles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ring.yaml").write_text("composition: ring\nmembers: [{use: ring}]\n")
    (tmp_path / "loop.yaml").write_text("macro: loop\nfunction: [linear, loop]\n")
    (tmp_path / "uses.yaml").write_text(GOOD.replace("{low_rank: {rank: $rank}}", "loop"))
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path))
    with pytest.raises(SpecError, match="in a circle"):
        load("ring")
    with pytest.raises(SpecError, match="contains itself"):
        load("mine")


def test_places_reach_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("{low_rank: {rank: $rank}}", "[linear, {vector: {init: $rank}}]")
                    + "procedures: [consistency]\n")
    technique = load(path).members[0].technique
    second = technique.modules[0].function.children[1]
    assert str(second.mark) == f"{path}:7:24"
    assert str(technique.procedures[0].mark) == f"{path}:9:14"
