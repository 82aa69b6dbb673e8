"""YAML 1.2 with places: every value knows its line and column.

A document becomes a tree of `Node`. Later steps rewrite the tree (parameters, macros) and keep
the marks, so that `validated` can say ``path:line:col`` for what pydantic refuses.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from peftref.errors import Mark, SpecError, unknown_name

__all__ = ["LARGEST_DOCUMENT", "Node", "node_of", "parse_value", "parse_yaml", "plain", "read_yaml",
           "to_text", "validated"]

LARGEST_DOCUMENT = 1 << 18  # a spec is a page; a megabyte is a mistake or an attack
DEEPEST = 40

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place: a scalar, a tuple of nodes, or a mapping of text to nodes.

    ``keys`` has the places of a mapping's keys. ``mark`` is None for values made in Python.
    ``computed`` is the text with placeholders that the value was made from.
    """

    value: Any
    mark: Mark | None = None
    keys: Mapping[str, Mark | None] = field(default_factory=dict)
    computed: str | None = None

    @property
    def is_mapping(self) -> bool:
        """Whether the node is a mapping."""
        return isinstance(self.value, dict)

    def replaced(self, value: Mapping[str, Node] | Sequence[Node]) -> Node:
        """Return the node with other content at the same place."""
        content = dict(value) if isinstance(value, Mapping) else tuple(value)
        return Node(content, self.mark, self.keys)


def read_yaml(path: Path) -> Node:
    """Return the document in the file at ``path``.

    Raises:
        SpecError: the file cannot be read, or is not a document as `parse_yaml` wants it.
    """
    try:
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise SpecError(f"{path}: larger than {LARGEST_DOCUMENT} bytes; not a specification")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error


def parse_yaml(text: str, source: str) -> Node:
    """Return the one mapping that ``text`` holds.

    Args:
        text: YAML 1.2 without anchors, aliases and tags.
        source: what messages call the text, usually its path.

    Raises:
        SpecError: not YAML, too large or deep, an alias, a duplicate key, or not a mapping.
    """
    if len(text) > LARGEST_DOCUMENT:
        raise SpecError(f"{source}: larger than {LARGEST_DOCUMENT} bytes; not a specification")
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        if root is None:
            raise SpecError("the document is empty", mark=Mark(source, 1, 1))
        node = _Reader(source).node(root, 0)
    except MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        mark = Mark(source, place.line + 1, place.column + 1) if place else None
        raise SpecError(f"not valid YAML: {error.problem or error.context}", mark=mark) from error
    except YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise SpecError(f"{source}: nested deeper than {DEEPEST} levels") from error
    if not node.is_mapping:
        raise SpecError("a document is a mapping of fields to values", mark=node.mark)
    return node


def parse_value(text: str) -> Any:  # noqa: ANN401 - the loader's border
    """Return the plain value that ``text`` is in YAML: how ``--set name=text`` is read."""
    return plain(parse_yaml(f"value: {text}", "<value>").value["value"])


class _Reader:
    """Turns composed YAML nodes into `Node`; aliases show as nodes met twice."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.constructor = YAML(typ="safe", pure=True).constructor

    def mark(self, node: YamlNode) -> Mark:
        return Mark(self.source, node.start_mark.line + 1, node.start_mark.column + 1)

    def node(self, node: YamlNode, depth: int) -> Node:
        mark = self.mark(node)
        if node.anchor is not None:
            raise SpecError(f"anchors and aliases are not accepted (&{node.anchor}); write the "
                            "value out", mark=mark)
        if depth > DEEPEST:
            raise SpecError(f"nested deeper than {DEEPEST} levels", mark=mark)
        if isinstance(node, SequenceNode):
            return Node(tuple(self.node(item, depth + 1) for item in node.value), mark)
        if isinstance(node, MappingNode):
            return self.mapping(node, mark, depth)
        return Node(self.scalar(node), mark)

    def mapping(self, node: MappingNode, mark: Mark, depth: int) -> Node:
        content: dict[str, Node] = {}
        keys: dict[str, Mark | None] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.anchor is not None:
                raise SpecError("a key is plain text", mark=self.mark(key))
            if key.value in content:
                raise SpecError(f"duplicate key {key.value!r}; first at {keys[key.value]}",
                                mark=self.mark(key))
            content[key.value] = self.node(value, depth + 1)
            keys[key.value] = self.mark(key)
        return Node(content, mark, keys)

    def scalar(self, node: YamlNode) -> Any:  # noqa: ANN401 - the loader's border
        value = self.constructor.construct_object(node, deep=True)
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"a number is finite, not {node.value}", mark=self.mark(node))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return node.value  # a date or other YAML type that specs have no use for: its text


def node_of(value: object, mark: Mark | None = None) -> Node:
    """Return ``value``, made of Python's plain containers, as a tree of nodes."""
    if isinstance(value, Node):
        return value
    if isinstance(value, Mapping):
        return Node({str(key): node_of(item, mark) for key, item in value.items()}, mark)
    if isinstance(value, list | tuple):
        return Node(tuple(node_of(item, mark) for item in value), mark)
    return Node(value, mark)


def plain(node: Node) -> Any:  # noqa: ANN401 - the loader's border
    """Return the value of ``node`` in Python's plain containers."""
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(item) for item in node.value]
    return node.value


def validated(model: type[Model], node: Node) -> Model:
    """Return ``node`` as an instance of ``model``.

    Raises:
        SpecError: at the place of the first field that is wrong.
    """
    try:
        return model.model_validate(plain(node))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt field is also a missing one: the misspelling says more.
        first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        mark, place = _find(node, first["loc"], first["type"])
        raise SpecError(_message(model, first, place), mark=mark) from error


def _message(model: type[BaseModel], problem: Any, place: str) -> str:  # noqa: ANN401
    name = str(problem["loc"][-1]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, problem["loc"][:-1])
        fields = [f.alias or key for key, f in owner.model_fields.items() if not f.exclude]
        return unknown_name(f"field in {place}" if place else "field", name, fields)
    if problem["type"] == "missing":
        return f"field {name!r} is missing" + (f" in {place}" if place else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        message += f", not {problem['input']!r:.60}"
    return f"{place}: {message}" if place else message


def _find(node: Node, location: Sequence[int | str], kind: str) -> tuple[Mark | None, str]:
    """Return the mark of the deepest node on the way to ``location``, and that way as text."""
    mark, way = node.mark, ""
    for index, step in enumerate(location):
        if isinstance(node.value, dict) and step in node.value:
            last = index == len(location) - 1
            unknown = last and kind == "extra_forbidden"
            if unknown:
                return node.keys.get(str(step)), way
            node = node.value[step]
            way = f"{way}.{step}" if way else str(step)
        elif isinstance(node.value, tuple) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            way = f"{way}[{step}]"
        else:
            break
        mark = node.mark
    return mark, way


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """Return the model whose field ``location`` leads to."""
    for step in location:
        field_ = model.model_fields.get(str(step))
        inner = _models_in(field_.annotation) if field_ else []
        model = inner[0] if inner else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def to_text(data: object) -> str:
    """Return ``data``, made of plain containers, as YAML text."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = None
    writer.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    writer.width = 100
    buffer = io.StringIO()
    writer.dump(data, buffer)
    return buffer.getvalue()
