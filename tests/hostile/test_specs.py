"""Specifications that are broken or meant to do harm: one SpecError, soon and in little memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peftref.errors import SpecError
from peftref.spec import load
from tests.hostile.cases import Case, each, tried

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


def rank(text: str) -> str:
    return GOOD.replace("default: 8", f"default: {text}")


def scale(text: str) -> str:
    return GOOD.replace("16 / rank", text)


TEXTS = [
    Case("a bomb of aliases", "anchors and aliases are not accepted",
         "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(60))),
    Case("an alias inside itself", "anchors and aliases are not accepted", "a: &a [*a]\nb: 1\n"),
    Case("a merge key with an alias", "anchors and aliases are not accepted",
         "a: &a {b: 1}\nc:\n  <<: *a\n"),
    Case("5,000 nested lists", "nested deeper than 40 levels", "x:\n " + "- " * 5000 + "1\n"),
    Case("700 nested mappings", "nested deeper than 40 levels",
         "".join(" " * n + "a:\n" for n in range(700))),
    Case("a text of 300 kB", "larger than 262144 bytes", GOOD + "# " + "a" * 300_000),
    Case("a Python object as a tag", "tags are not accepted",
         "technique: !!python/object/apply:os.system [ls]\nx: 1\n"),
    Case("a Python name as a tag", "tags are not accepted",
         "technique: !!python/name:os.system\nx: 1\n"),
    Case("an unknown tag", "tags are not accepted (!mine)", "technique: !mine a\nx: 1\n"),
    Case("a tag without its number", "tags are not accepted", "technique: !!int\nx: 1\n"),
    Case("rank 10**30", "a whole number is below 2**63", rank("1" + "0" * 30)),
    Case("a number of 5,000 digits", "a whole number is below 2**63", rank("9" * 5000)),
    Case("a hexadecimal number of 5,000 digits", "a whole number is below 2**63",
         rank("0x" + "f" * 5000)),
    Case("1e400", "a number is finite, not 1e400", rank("1e400")),
    Case("not a number", "a number is finite, not .nan", rank(".nan")),
    Case("infinity in a range", "a number is finite, not .inf", GOOD.replace("64]", ".inf]")),
    Case("a day that does not exist", "not '2001-02-30'", "technique: 2001-02-30\nx: 1\n"),
    Case("a tab for a space", "not valid YAML", "technique: a\n\tmodules: b\n"),
    Case("a duplicate key", "duplicate key 'technique'", "technique: a\ntechnique: b\n"),
    Case("a mapping as a key", "a key is plain text", "? {a: b}\n: c\nd: e\n"),
    Case("two documents", "but found another document", GOOD + "---\n" + GOOD),
    Case("a NUL character", "special characters are not allowed", "technique: a\0b\nx: 1\n"),
    Case("half of a surrogate pair", "special characters are not allowed", "a: \ud800\nb: 1\n"),
    Case("9**9**9", "an exponent is at most 64", scale("9**9**9")),
    Case("2**64**64", "below 2**63", scale("2**64**64")),
    Case("a product of large numbers", "below 2**63", scale("*".join(["9" * 50] * 5))),
    Case("a text times a number", "not a number", scale("'a' * 999999999")),
    Case("infinity in arithmetic", "below 2**63, not inf", scale("1e999")),
    Case("the root of a negative number", "not negative", scale("sqrt(-1)")),
    Case("a call of the interpreter", "is not allowed in arithmetic",
         scale("__import__('os').system('ls')")),
    Case("10,000 times lora(", "an expression is at most 4000 characters", "lora(" * 10_000),
    Case("600 times lora(", "too many nested parentheses", "lora(" * 600),
    Case("600 signs before a number", "nested too deep", "lora(rank=" + "-" * 600 + "1)"),
    Case("a number of 3,900 digits in an expression", "a whole number is below 2**63",
         "lora(rank=1" + "0" * 3900 + ")"),
    Case("a NUL in an expression", "not a technique expression", "lora\0"),
    Case("an empty expression", "not a technique expression", " "),
    Case("a device as a path", "not a regular file", "'/dev/zero'"),
    Case("a path out of the folder that is no spec", "cannot be read", "'../../no/such.yaml'"),
]


@each("specification", TEXTS)
def test_a_text_is_refused(case: Case) -> None:
    begun = time.process_time()
    with pytest.raises(SpecError) as raised:
        load(case.made)
    # A hundredth of a second on an idle machine.
    assert time.process_time() - begun < 2.0
    assert case.says in str(raised.value)
    assert len(str(raised.value)) < 1200


FILES = [
    Case("an empty file", "the document is empty", b""),
    Case("a file of comments", "the document is empty", b"# nothing\n"),
    Case("bytes that are no text", "not UTF-8 text", bytes(range(128, 256))),
    Case("Latin-1", "not UTF-8 text", GOOD.encode() + b"# \xe9\n"),
    Case("UTF-16", "not UTF-8 text", GOOD.encode("utf-16")),
    Case("a file of a megabyte", "larger than 262144 bytes", b"a" * (1 << 20)),
    Case("a folder by the name of a file", "not a regular file", None),
]


@each("specification file", FILES)
def test_a_file_is_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.mkdir() if case.made is None else path.write_bytes(case.made)
    with pytest.raises(SpecError) as raised:
        load(path)
    assert case.says in str(raised.value)


@tried("specification file", "a byte order mark", "read as if it were not there")
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(path) == load(GOOD)


VALUES = [
    Case("a list inside itself as a value", "nested deeper than 200 levels", None),
    Case("10**5000 as a value", "a whole number is below 2**63", {"rank": 10**5000}),
    Case("not a number as a value", "must be a number, not nan", {"alpha": float("nan")}),
    Case("an object as a value", "must be an integer", {"rank": object()}),
]


@each("value", VALUES)
def test_a_value_is_refused(case: Case) -> None:
    ring: list[object] = []
    ring.append(ring)
    with pytest.raises(SpecError) as raised:
        load("lora", **({"layers": ring} if case.made is None else case.made))
    assert case.says in str(raised.value)


CIRCLES = [
    Case("a composition that uses itself", "in a circle",
         {"ring": "composition: ring\nmembers: [{use: ring}]\n"}),
    Case("two compositions that use each other", "in a circle",
         {"ring": "composition: ring\nmembers: [{use: gnir}]\n",
          "gnir": "composition: gnir\nmembers: [{use: ring}]\n"}),
    Case("a macro that contains itself", "contains itself",
         {"loop": "macro: loop\nfunction: [linear, loop]\n",
          "ring": GOOD.replace("mine", "ring").replace("{low_rank: {rank: $rank}}",
                                                       "[loop, {vector: {init: $rank}}]")}),
]


@each("catalogue", CIRCLES)
def test_a_circle_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in case.made.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path))
    with pytest.raises(SpecError, match=case.says):
        load("ring")


@tried("catalogue", "devices, folders, dead links and binary files by the names of specs",
       "ignored; every other name still loads")
def test_strange_files_in_a_catalogue_hurt_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)) * 16)
    monkeypatch.setenv("PEFTREF_CATALOGUE", str(tmp_path))
    assert load("lora").members[0].technique.technique == "lora"
