"""The sites of a backbone: printed for people and programs, saved as a row, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftref.backbone.family import families, read_family
from peftref.cli.app import main
from tests.backbone.tiny import tiny_config


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert isinstance(end.value.code, int)
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_sites_are_shown_with_shapes_and_slices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("gpt_neox").save_pretrained(tmp_path / "model")
    code, out, _ = _run(capsys, "show", "--backbone", str(tmp_path / "model"), "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["source"], found["layers"], found["norms"]) == (
        "built-in", {"decoder": 2}, "pre")
    sites = {site["role"]: site for site in found["sites"]}
    assert sites["attention.key"]["rows"] == "8:16 of each 24, 4 times"
    assert sites["ffn.up"]["module"] == "layers.*.mlp.dense_h_to_4h"
    assert (sites["ffn.up"]["d_in"], sites["ffn.up"]["d_out"], sites["ffn.up"]["layers"]) == (
        32, 48, [0, 1])
    assert "keys_values" in sites["attention"]["ports"]
    _, out, _ = _run(capsys, "show", "--backbone", str(tmp_path / "model"))
    assert "by a built-in row" in out
    assert all(role in out for role in sites)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_saved_row_is_read_back_and_gives_the_same_sites(
    hidden: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_config("t5").save_pretrained(tmp_path / "model")
    if hidden:
        monkeypatch.setattr("peftref.backbone.hf.table.families", dict)
    words = ("show", "--json", "--backbone", str(tmp_path / "model"))
    row = tmp_path / "row.yaml"
    first = json.loads(_run(capsys, *words, "--save", str(row))[1])
    assert first["source"] == ("inferred" if hidden else "built-in")
    assert all(bool(site["why"]) == hidden for site in first["sites"] if "." in site["role"]
               and not site["role"].startswith("residual"))
    if not hidden:
        assert read_family(row) == families()["t5"]
    second = json.loads(_run(capsys, *words, "--sites", str(row))[1])
    assert second["source"] == "given"
    for found in (first, second):
        for site in found["sites"]:
            del site["why"]
    assert first["sites"] == second["sites"]
    code, _, err = _run(capsys, *words, "--save", str(row))
    assert code == 2
    assert "row.yaml exists" in err


@pytest.mark.parametrize(("words", "message"), [
    (["show"], "show what?"),
    (["show", "lora", "--sites", "x.yaml"], "--sites and --save are about a backbone"),
    (["show", "--backbone", "b", "--passes"], "show a technique"),
    (["show", "lora", "--backbone", "b", "--save", "x.yaml"], "leave that out"),
    (["check", "lora", "--sites", "x.yaml"], "--sites describes a backbone"),
])
def test_options_without_effect_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, *words)
    assert code == 2
    assert message in err
