"""show, and check against a backbone: counts by formula, pictures that other programs read."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from peftref.cli.app import main
from peftref.cli.typology import typology
from peftref.spec import load
from peftref.spec.catalogue import entries

LAYERS, WIDTH, INNER = 3, 32, 64


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a configuration only: weights are not read."""
    folder = tmp_path_factory.mktemp("bert")
    BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=INNER, vocab_size=101,
        num_attention_heads=4, architectures=["BertModel"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert isinstance(end.value.code, int)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return end.value.code, captured.out, captured.err


def test_the_graph_after_a_pass(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(
        capsys, "show", "lora(rank=2)", "--backbone", backbone, "--after", "resolve sites"
    )
    assert code == 0
    assert out.splitlines() == [
        f"%0 = read encoder.0.attention.query.input:{WIDTH} ()",
        "%1 = function chain(%0)",
        "%2 = write lora.delta @ encoder.0.attention.query.output parallel scaled_add 8 (%1)",
        f"%3 = read encoder.0.attention.value.input:{WIDTH} ()",
        "%4 = function chain(%3)",
        "%5 = write lora.delta @ encoder.0.attention.value.output parallel scaled_add 8 (%4)",
    ]
    code, _, err = _run(capsys, "show", "lora", "--backbone", backbone, "--after", "fus")
    assert code == 2
    assert "Did you mean 'fuse'?" in err


def test_counts_follow_from_shapes(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    rank, bottleneck = 4, 5
    source = f"lora(rank={rank}) + scaled_parallel_adapter(bottleneck={bottleneck})"
    code, out, _ = _run(capsys, "show", source, "--backbone", backbone, "--json")
    plan: dict[str, Any] = json.loads(out)["plan"]
    lora = 2 * LAYERS * 2 * WIDTH * rank
    adapter = LAYERS * (2 * WIDTH * bottleneck + WIDTH + bottleneck)
    assert code == 0
    assert plan["trainable_parameters"] == lora + adapter
    assert sum(edit["total"] for edit in plan["edits"]) == lora + adapter
    assert sum(edit["sites"] for edit in plan["edits"]) == 3 * LAYERS
    assert all(edit["layers"] == list(range(LAYERS)) for edit in plan["edits"])
    assert not plan["properties"]["mergeable"]


def test_what_a_person_reads(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "show", "lora", "--backbone", backbone, "--passes")
    assert (code, err) == (0, "")
    assert f"down.weight 8x{WIDTH}, up.weight {WIDTH}x8" in out
    assert re.search(rf"trainable +{2 * LAYERS * 2 * WIDTH * 8:,} parameters", out)
    assert re.search(r"mergeable +yes", out)
    assert "resolve sites" in out


def test_a_technique_is_shown_without_a_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "show", "lora(rank=3)")
    assert code == 0
    assert re.search(r"^rank +3 +1 to 1024 +r\b", out, re.MULTILINE)
    assert "https://arxiv.org/abs/2106.09685" in out
    code, out, _ = _run(capsys, "show", "lora(rank=3)", "--yaml")
    assert code == 0
    assert load(out) == load("lora(rank=3)")


@pytest.mark.parametrize("suffix", ["svg", "dot", "mmd"])
def test_pictures(
    suffix: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"graph.{suffix}"
    assert _run(capsys, "show", "lora", "--backbone", backbone, "--graph", str(file))[0] == 0
    text = file.read_text()
    # A picture of one site stands for all layers, for query and for value: a read, two factors
    # with a weight each, and a write.
    arrows, boxes = 2 * 5, 2 * 6
    if suffix == "svg":
        root = ET.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        lines = [item.text for item in root.iter(f"{space}text")]
        assert len(root.findall(f"{space}rect")) == boxes + 1
        assert len(root.findall(f"{space}path")) == arrows
        assert lines.count(f"{LAYERS} sites, parallel") == 2
    else:
        arrow = " -> n" if suffix == "dot" else " --> n"
        assert text.count(arrow) == arrows
        assert len(re.findall(r"^  n\d+ ?\[", text, re.MULTILINE)) == boxes
        assert f"{LAYERS} sites, parallel" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "lora", "--graph", "x.svg"], "give --backbone"),
        (["show", "lora", "--backbone", "./no/such/model"], "no/such/model"),
        (["show", "lora", "--backbone", "BACKBONE", "--graph", "x.pdf"], ".svg, .dot, .mmd"),
        (["show", "lora(site='attention.quary')", "--backbone", "BACKBONE"], "attention.query"),
        (["show", "lora", "--backbone", "BACKBONE", "--task", "sing"], "sing"),
    ],
)
def test_what_cannot_be_shown_is_one_message(
    words: list[str], message: str, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, *(backbone if w == "BACKBONE" else w for w in words))
    assert code == 2
    assert message in err


def test_check_compiles_all_that_it_is_given(
    backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(
        capsys, "check", "ia3", "lora(site='ffn.gate')", "dora + dora", "--backbone", backbone
    )
    trained = LAYERS * (2 * WIDTH + INNER)
    assert code == 2
    assert out == f"ok  ia3: 1 technique, 2 modules (ia3); {trained} trainable parameters\n"
    assert len(err.splitlines()) == 2


def test_the_typology_of_the_paper() -> None:
    """Rows of Sabry and Belz 2023 for techniques whose row leaves no choice of words."""
    rows = {
        name: [(r.parameters_adapted, r.input_type, r.insertion, r.sharing)
               for r in typology(load(name))]
        for name in ("lora", "prompt_tuning", "houlsby_adapter", "bitfit")
    }  # fmt: skip
    assert rows == {
        "lora": [("reparameterisation", "data", "parallel", "none")],
        "prompt_tuning": [("addition", "weights", "parallel", "none")],
        "houlsby_adapter": [("addition", "hidden", "sequential", "none")],
        "bitfit": [("selection", "weights", "parallel", "none")],
    }
    assert next(iter(typology(load("ia3")))).intra_connectivity == "none (vector)"
    assert {row.inter_connectivity for row in typology(load("unipelt"))} == {"dynamic"}


@pytest.mark.parametrize("name", [e.name for e in entries().values() if e.kind != "macro"])
def test_every_entry_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "show", name)
    assert (code, err) == (0, "")
    assert out.startswith(name)


def test_show_tells_the_form_of_each_write_and_why(
    backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["show", "lora(rank=2)", "--backbone", backbone]
    reasons: list[str] = []
    for more in (["--dtype", "float32"], ["--device", "h100", "--dtype", "bfloat16"]):
        code, out, _ = _run(capsys, *words, *more, "--json")
        assert code == 0
        (edit, *_) = json.loads(out)["plan"]["edits"]
        assert (edit["form"], edit["op"]) == ("factored", "lora_linear")
        reasons.append(edit["why"])
        assert "lora_linear" in _run(capsys, *words, *more)[1]
    assert "accumulate" in reasons[0]
    assert "rank 2 padded to 16" in reasons[1]
    code, _, err = _run(capsys, *words, "--device", "h10")
    assert code == 2
    assert "Did you mean 'h100'" in err
