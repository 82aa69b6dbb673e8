"""Arithmetic, parameters and JSON schemas."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from peftref.spec import load
from peftref.spec.arithmetic import evaluate, names_in
from peftref.spec.catalogue import entries
from peftref.spec.loader import parse_value, parse_yaml, plain, read_yaml
from peftref.spec.schema import json_schema
from peftref.spec.selector import is_site_pattern, layers_of
from peftref.spec.template import KINDS

NUMBERS = st.integers(1, 50).map(str) | st.floats(0.01, 50).map(repr) | st.sampled_from(["a", "b"])


def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["+", "-", "*", "/", "//", "<", "<=", "==", "!=", "and", "or"])
    return st.one_of(
        st.builds("({} {} {})".format, inner, operators, inner),
        st.builds("(-{})".format, inner),
        st.builds("(not {})".format, inner),
        st.builds("max({}, {})".format, inner, inner),
        st.builds("({} ** 2)".format, inner),
    )


@given(st.recursive(NUMBERS, deeper, max_leaves=6), st.integers(1, 9), st.floats(0.5, 9))
def test_arithmetic_is_pythons(source: str, a: int, b: float) -> None:
    values = {"a": a, "b": b}
    try:
        theirs = eval(source, {"__builtins__": {}, "max": max}, values)
        mine = evaluate(source, values)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match=r"divides by zero|not a number"):
            evaluate(source, values)
    except ValueError as refusal:  # Python takes False for 0; here a truth value is no number
        event(str(refusal)[-20:])
        assume("not a number" not in str(refusal) and "2**63" not in str(refusal))
        raise
    else:
        logical = any(word in source for word in ("and", "or", "not"))
        # `and` and `or` give a truth value here.
        assert bool(mine) == bool(theirs) if logical else mine == theirs


@pytest.mark.parametrize("source", [
    "a.real", "a[0]", "[a]", "(lambda: 1)()", "__import__('os')", "open('x')", "2 ** 65",
    "10.0 ** 60 ** 1", "(-8) ** 0.5", "1 / 0", "sqrt(-1)", "sqrt()", "max(1, key=a)", "f'{a}'",
    "a if a else 1", "a := 1", "'x' * 9", "'x' < 1", "1 < 2 < 3", "", "1 +", "b", "9" * 400,
    "True + 1", "(" * 250 + "1" + ")" * 250,
])
def test_arithmetic_refuses(source: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        evaluate(source, {"a": 2})


def test_names_are_what_is_read() -> None:
    assert names_in("sqrt(a) + min(b, a) ** c") == {"a", "b", "c"}
    assert evaluate("sqrt(2) * 1", {}) == math.sqrt(2)


@pytest.mark.parametrize(("text", "valid"), [
    ("attention.query", True), ("*", True), ("norm.*", True), ("attention.{query,value}", True),
    ("{attention,cross_attention?}.{key,value}", True), ("cross_attention?.key", True),
    (r"module:.*\.(q|v)_proj", True), ("module:(", False), ("", False), (".", False),
    ("attention.", False), ("{a,b", False), ("{a,}", False), ("a b", False), ("a..b", False),
])
def test_site_patterns(text: str, valid: bool) -> None:
    assert is_site_pattern(text) is valid


@pytest.mark.parametrize(("value", "result"), [
    ("all", "all"), ("0:6:2", "0:6:2"), (":-1", ":-1"), ("::-1", "::-1"), ([0, -1], (0, -1)),
    ("3", None), ("0:6:0", None), ([], None), ([True], None), (3, None), (["1"], None),
])
def test_layers(value: object, result: object) -> None:
    assert layers_of(value) == result


@pytest.mark.parametrize(("text", "value"), [
    ("4", 4), ("1e-3", 1e-3), ("true", True), ("no", "no"), ("[0, 1]", [0, 1]), ("null", None),
    ("'4'", "4"), ("attention.*", "attention.*"), ("0:6", "0:6"), ("2020-01-01", "2020-01-01"),
])
def test_values_from_a_command_line(text: str, value: object) -> None:
    found = parse_value(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(("by", "down", "names"), [
    ("$kind", "two", ["linear", "linear"]), ("$kind", "one", ["vector"]),
    ("${kind == 'two'}", "two", ["linear"]), ("${kind == 'two'}", "one", ["vector"]),
])
def test_choose_takes_one_branch(by: str, down: str, names: list[str]) -> None:
    branches = {"one": "vector", "two": ["linear", "linear"]}
    if "==" in by:
        branches = {"true": ["linear"], "false": ["vector"]}
    module = {"name": "m", "site": {"select": "ffn"},
              "function": {"choose": {"by": by, **branches}},
              "interaction": {"insertion": "parallel", "integration": "add"}}
    kind = {"type": "choice", "default": "one", "choices": ["one", "two"]}
    spec = load({"technique": "t", "parameters": {"kind": kind}, "modules": [module]}, kind=down)
    function = spec.members[0].technique.modules[0].function
    assert [leaf.name for leaf in function.children or (function,)] == names


def refused(schema: dict[str, Any], document: object) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    return [error.message for error in validator.iter_errors(document)]


def test_schemas_accept_the_catalogue_and_refuse_mistakes() -> None:
    schemas = {kind: json_schema(kind) for kind in KINDS}
    for entry in entries().values():
        assert not refused(schemas[entry.kind], plain(read_yaml(entry.path)))
    text = entries()["lora"].path.read_text()
    schema = json_schema("technique", primitives=["linear", "dropout"])
    assert not refused(schema, plain(parse_yaml(text, "lora")))
    for old, new in (("insertion", "insertoin"), ("low_rank", "low_rnk"), ("select", "selct"),
                     ("type: int", "type: integer"), ("modules:", "moduls:")):
        assert refused(schema, plain(parse_yaml(text.replace(old, new), "lora")))
