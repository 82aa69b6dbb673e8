"""Whatever the bytes: a value, or an error of ours. `make fuzz` draws new ones for ten minutes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peftref
from peftref.artifact import read
from peftref.errors import PeftRefError
from peftref.spec import load
from peftref.spec.catalogue import entries
from peftref.spec.loader import Node, parse_yaml
from tests.backbone.tiny import tiny
from tests.hostile.cases import tried

INFO, TENSORS = "peftref.json", "adapter_model.safetensors"
SPECS = sorted(entry.path for entry in entries().values())
WORDS = [
    "technique", "composition", "macro", "modules", "site", "select", "function", "rank", "$",
    "$rank", "${", "}", "choose", "by", "members", "use", "low_rank", "chain", "lora", "~", "<<",
    "0x", "1e999", "2001-02-30", "!!int", "&a", "*a", ".nan", "\t", "\0", "\ufeff", "---\n", "? ",
    "%YAML 1.1\n", "- ", ": ", "\n", "  ", "[", "{", "]", "'", '"', "|", ">", "9" * 40,
]
LEAVES = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
          | st.sampled_from(WORDS) | st.integers(0, 400).map(lambda n: 10**(20 * n)))
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=4), max_leaves=12)
EDITS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 12),
                           st.sampled_from(WORDS) | st.text(max_size=5)), min_size=1, max_size=5)


@tried("fuzzed", "any text as YAML", "a tree of plain values, or a SpecError")
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=20).map("".join))
def test_any_text(text: str) -> None:
    with suppress(PeftRefError):
        assert isinstance(parse_yaml(text, "<text>"), Node)


@tried("fuzzed", "any structure as a specification", "a composition, or one of our errors")
@given(TREES)
def test_any_structure(tree: object) -> None:
    with suppress(PeftRefError):
        load(tree if isinstance(tree, Mapping) else {"technique": "a", "modules": tree})


@tried("fuzzed", "shipped specifications with letters changed",
       "a composition, or one of our errors")
@given(st.sampled_from(SPECS), EDITS)
def test_any_damage_of_a_shipped_file(path: Path, edits: list[tuple[int, int, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    for start, length, piece in edits:
        start %= len(text)
        text = text[:start] + piece + text[start + length:]
    with suppress(PeftRefError):
        load("\n" + text)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapted = peftref.attach(tiny("bert"), "ia3")
    return adapted.save(tmp_path_factory.mktemp("fuzz") / "good")


@pytest.fixture(scope="module")
def bad(good: Path) -> Path:
    folder = good.with_name("bad")
    folder.mkdir(exist_ok=True)
    return folder


def _read(good: Path, bad: Path, changed: Mapping[str, bytes]) -> None:
    for name in (INFO, TENSORS):
        (bad / name).write_bytes(changed.get(name, (good / name).read_bytes()))
    with suppress(PeftRefError):
        read(bad)


CUTS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 9), st.binary(max_size=9)),
                min_size=1, max_size=4)


@tried("fuzzed", "either file of an artifact with bytes changed", "read, or one of our errors")
@given(st.sampled_from([INFO, TENSORS]), CUTS)
def test_any_damaged_bytes_of_an_artifact(
    good: Path, bad: Path, name: str, cuts: list[tuple[int, int, bytes]]
) -> None:
    content = (good / name).read_bytes()
    for start, length, piece in cuts:
        start %= len(content)
        content = content[:start] + piece + content[start + length:]
    _read(good, bad, {name: content})


def _changed(tree: Any, way: list[int], leaf: object) -> Any:
    """Put ``leaf`` at the place in ``tree`` that the numbers lead to."""
    if not way or not isinstance(tree, dict | list) or not tree:
        return leaf
    keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[way[0] % len(keys)]
    tree[key] = _changed(tree[key], way[1:], leaf)
    return tree


WAYS = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@tried("fuzzed", "any value anywhere in peftref.json", "read, or one of our errors")
@given(WAYS, TREES)
def test_any_value_in_the_description(good: Path, bad: Path, way: list[int], leaf: object) -> None:
    info = _changed(json.loads((good / INFO).read_text()), way, leaf)
    with suppress(ValueError):  # what JSON itself cannot write
        _read(good, bad, {INFO: json.dumps(info).encode()})


@tried("fuzzed", "any value anywhere in the header of a tensor file",
       "read, or one of our errors")
@given(WAYS, TREES)
def test_any_value_in_a_tensor_header(good: Path, bad: Path, way: list[int], leaf: object) -> None:
    content = (good / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = _changed(json.loads(content[8:8 + length]), way, leaf)
    try:
        text = json.dumps(header).encode()
    except ValueError:  # what JSON itself cannot write
        return
    _read(good, bad, {TENSORS: struct.pack("<Q", len(text)) + text + content[8 + length:]})
