"""list, check, schema and init: what a program and a person get, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from peftref.cli.app import main
from peftref.cli.init import StartKind
from peftref.cli.schema import SchemaKind, schema_of
from peftref.search.settings import SearchRun
from peftref.spec import load
from peftref.spec.catalogue import entries
from peftref.spec.loader import plain, read_yaml, validated
from peftref.training.settings import RunSettings


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert isinstance(end.value.code, int)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return end.value.code, captured.out, captured.err


def test_list_names_every_entry_of_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "list")
    listed = {line.split()[0] for line in out.splitlines()[1:]}
    assert listed == {e.name for e in entries().values() if e.kind != "macro"}
    assert (code, err) == (0, "")


def test_list_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "list", "--json", "--kind", "all")
    rows = {(row["kind"], row["name"]): row for row in json.loads(out)}
    lora = rows["technique", "lora"]
    assert code == 0
    assert lora["parameters"]["rank"] == 8
    assert lora["places"] == ["attention.{query,value}"]
    assert lora["url"] == "https://arxiv.org/abs/2106.09685"
    assert ("primitive", "linear") in rows
    assert ("coupling", "mix") in rows
    assert ("macro", "low_rank") in rows


def test_a_broken_file_hurts_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("technique: bad\nmodulez: []\n")
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path))
    code, out, err = _run(capsys, "list")
    assert code == 2
    assert "lora" in out
    assert "bad.yaml:2:1" in err
    assert "Did you mean 'modules'" in err


def test_check_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "check", "loar", "lora + ia3")
    assert code == 2
    assert out == "ok  lora + ia3: 2 techniques, 3 modules (lora, ia3)\n"
    assert "Did you mean 'lora'" in err
    code, out, err = _run(capsys, "check", "--json", "lora(rank=0)")
    (result,) = json.loads(out)
    assert (code, result["valid"], err) == (2, False, "")
    assert "from 1 to 1024, not 0" in result["message"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("liner", r":4:15: Unknown primitive 'liner'.*Did you mean 'linear'"),
        ("{linear: {outt: 4}}", "Did you mean 'out'"),
        ("{dropout: {p: 1.5}}", "p"),
    ],
)
def test_check_knows_the_words_of_a_function(
    function: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "technique: mine\nmodules:\n  - name: delta\n"
        f"    function: {function}\n"
        "    site: {select: attention.query}\n"
        "    interaction: {insertion: parallel, integration: add}\n"
    )
    code, out, err = _run(capsys, "check", str(file))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}:4:")
    assert re.search(message, err)


@pytest.mark.parametrize("kind", ["technique", "composition", "macro"])
def test_every_shipped_file_fits_its_schema(kind: SchemaKind) -> None:
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    found = [entry for entry in entries().values() if entry.kind == kind]
    assert found
    for entry in found:
        problems = [p.message for p in validator.iter_errors(plain(read_yaml(entry.path)))]
        assert problems == [], entry.path


@pytest.mark.parametrize(
    ("field", "value"),
    [("modulez", []), ("modules", []), ("reference", {"paper": 3}), ("learning_rate", {"x": 1})],
)
def test_the_schema_refuses_what_the_loader_refuses(field: str, value: object) -> None:
    data = plain(read_yaml(entries()["lora"].path)) | {field: value}
    assert not jsonschema.Draft202012Validator(schema_of("technique")).is_valid(data)


@pytest.mark.parametrize("kind", ["run", "search", "technique", "composition"])
def test_init_writes_what_its_reader_takes(
    kind: StartKind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / f"{kind}.yaml"
    code, out, _ = _run(capsys, "init", kind, str(file))
    assert (code, out) == (0, f"{file}\n")
    first = file.read_text().split("\n", 1)[0]
    schema = json.loads((file.parent / first.rpartition("=")[2]).read_text())
    document = read_yaml(file)
    jsonschema.Draft202012Validator(schema).validate(plain(document))
    if kind == "run":
        settings = validated(RunSettings, document)
        assert isinstance(settings.composition, str)
        load(settings.composition)
    elif kind == "search":
        assert validated(SearchRun, document).search.space.techniques
    else:
        assert load(file).composition == f"my_{kind}"


def test_init_keeps_files_and_names_a_technique_for_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slim-lora.yaml"
    assert _run(capsys, "init", "technique", str(file))[0] == 0
    assert load(file).composition == "slim_lora"
    code, _, err = _run(capsys, "init", "technique", str(file))
    assert code == 2
    assert "--force" in err
    assert _run(capsys, "init", "technique", str(file), "--force")[0] == 0
    code, _, err = _run(capsys, "init", "run", str(tmp_path / "run.txt"))
    assert code == 2
    assert ".yaml" in err
