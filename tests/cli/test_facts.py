"""The catalogue's derived facts: shipped as data, shown by list, printed as a page."""

from __future__ import annotations

import json

import pytest

from peftref.cli.app import main
from peftref.cli.facts import PAGE, facts_of, known_facts, page, reference_tables, shipped

HOW = "python -m peftref.cli.facts writes them anew"


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def test_facts_and_page_are_those_of_the_specifications() -> None:
    tables = reference_tables()
    found = {entry.name: facts_of(entry, tables) for entry in shipped()}
    stale = [name for name in {*found, *known_facts()}
             if json.loads(json.dumps(found.get(name))) != known_facts().get(name)]
    assert not stale, HOW
    assert PAGE.read_text(encoding="utf-8") == page(found), HOW


def test_counts_on_bert_base_are_the_published_ones() -> None:
    """UniPELT's table prints 895K, 295K and 184K for its three parts; (IA)3 and AdapterFusion
    follow from their formulas.
    """
    counts = {name: facts["counts"]["bert-base"] for name, facts in known_facts().items()}
    assert counts["pfeiffer_adapter"] == 894_528
    assert counts["lora"] == 294_912
    assert counts["ia3"] == 55_296
    assert counts["houlsby_adapter"] == 2_379_264
    assert counts["attention_fusion"] == 768


def test_list_filters_by_what_was_derived(capsys: pytest.CaptureFixture[str]) -> None:
    def names(where: str) -> set[str]:
        code, out, _ = _run(capsys, "list", "--json", "--where", where)
        assert code == 0
        return {row["name"] for row in json.loads(out)}

    everything = names("kind=technique") | names("kind=composition")
    assert {entry.name for entry in shipped()} == everything
    merging = names("mergeable")
    assert {"lora", "dora", "oft", "ia3", "bitfit"} <= merging
    assert not {"houlsby_adapter", "prefix_tuning", "unipelt"} & merging
    assert names("mergeable") | names("!mergeable") == everything
    assert names("mergeable,workspace=ffn") == merging & names("workspace=ffn")
    assert "lora" in names("vllm") & names("identity")
    assert "adalora" in names("procedures=rank_budget")


def test_an_unknown_property_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "list", "--where", "mergable")
    assert code == 2
    assert "Did you mean 'mergeable'" in err
