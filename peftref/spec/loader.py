"""YAML 1.2 with places: every value knows its line and column.

A document becomes a tree of `Node`. Later steps rewrite the tree (parameters, macros) and keep
the marks, so that `validated` can say ``path:line:col`` for what pydantic refuses.
"""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from peftref.errors import Mark, SpecError, unknown_name

__all__ = ["DEEPEST", "LARGEST_DOCUMENT", "Node", "node_of", "parse_value", "parse_yaml", "plain",
           "read_yaml", "to_text", "validated"]

LARGEST_DOCUMENT = 1 << 18  # a spec is a page; a megabyte is a mistake or an attack
DEEPEST = 40
DEEPEST_DATA = 200  # a resolved spec nests further than what a person writes
_INTEGERS = range(-(1 << 63), 1 << 63)

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
        if not stat.S_ISREG(path.stat().st_mode):
            raise SpecError(f"{path}: cannot be read (not a regular file)")
        with path.open("rb") as stream:
            content = stream.read(LARGEST_DOCUMENT + 1)
        if len(content) > LARGEST_DOCUMENT:
            raise SpecError(f"{path}: larger than {LARGEST_DOCUMENT} bytes; not a specification")
        return parse_yaml(content.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise SpecError(f"{path}: cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


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
        reader = YAML(typ="safe", pure=True)
        reader.Composer = partial(_Composer, source)
        root = reader.compose(text)
        if root is None:
            raise SpecError("the document is empty", mark=Mark(source, 1, 1))
        node = _Reader(source).node(root)
    except MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        mark = Mark(source, place.line + 1, place.column + 1) if place else None
        raise SpecError(f"not valid YAML: {error.problem or error.context}", mark=mark) from error
    except YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from error
    if not node.is_mapping:
        raise SpecError("a document is a mapping of fields to values", mark=node.mark)
    return node


def parse_value(text: str) -> Any:  # noqa: ANN401 - the loader's border
    """Return the plain value that ``text`` is in YAML: how ``--set name=text`` is read."""
    return plain(parse_yaml(f"value: {text}", "<value>").value["value"])


class _Composer(Composer):
    """Refuses what specs do not have before anything is made of it."""

    def __init__(self, source: str, loader: Any = None) -> None:  # noqa: ANN401 - ruamel's own
        super().__init__(loader=loader)
        self.source = source
        self.level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - ruamel's own
        event = self.parser.peek_event()
        place = event.start_mark
        mark = Mark(self.source, place.line + 1, place.column + 1)
        if event.anchor is not None:
            raise SpecError(f"anchors and aliases are not accepted (&{event.anchor}); write the "
                            "value out", mark=mark)
        if getattr(event, "ctag", None) is not None:
            raise SpecError(f"tags are not accepted ({event.ctag}); write the value without",
                            mark=mark)
        if self.level > DEEPEST:
            raise SpecError(f"nested deeper than {DEEPEST} levels", mark=mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Reader:
    """Turns composed YAML nodes into `Node`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.constructor = YAML(typ="safe", pure=True).constructor

    def mark(self, node: YamlNode) -> Mark:
        return Mark(self.source, node.start_mark.line + 1, node.start_mark.column + 1)

    def node(self, node: YamlNode) -> Node:
        mark = self.mark(node)
        if isinstance(node, SequenceNode):
            return Node(tuple(self.node(item) for item in node.value), mark)
        if isinstance(node, MappingNode):
            return self.mapping(node, mark)
        return Node(self.scalar(node), mark)

    def mapping(self, node: MappingNode, mark: Mark) -> Node:
        content: dict[str, Node] = {}
        keys: dict[str, Mark | None] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise SpecError("a key is plain text", mark=self.mark(key))
            if key.value in content:
                raise SpecError(f"duplicate key {key.value!r}; first at {keys[key.value]}",
                                mark=self.mark(key))
            content[key.value] = self.node(value)
            keys[key.value] = self.mark(key)
        return Node(content, mark, keys)

    def scalar(self, node: YamlNode) -> Any:  # noqa: ANN401 - the loader's border
        try:
            value = self.constructor.construct_object(node, deep=True)
        except ValueError:  # more digits than Python reads, or a day that does not exist
            value = 1 << 63 if str(node.tag).endswith(":int") else node.value
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"a number is finite, not {node.value}", mark=self.mark(node))
        if isinstance(value, int) and value not in _INTEGERS:
            raise SpecError(f"a whole number is below 2**63, not {node.value:.40}",
                            mark=self.mark(node))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return node.value  # a date or other YAML type that specs have no use for: its text


def node_of(value: object, mark: Mark | None = None, depth: int = 0) -> Node:
    """Return ``value``, made of Python's plain containers, as a tree of nodes.

    Raises:
        SpecError: it is nested too deep, or a whole number is too large.
    """
    if isinstance(value, Node):
        return value
    if depth > DEEPEST_DATA:
        raise SpecError(f"nested deeper than {DEEPEST_DATA} levels", mark=mark)
    if isinstance(value, Mapping):
        return Node({str(key): node_of(item, mark, depth + 1) for key, item in value.items()}, mark)
    if isinstance(value, list | tuple):
        return Node(tuple(node_of(item, mark, depth + 1) for item in value), mark)
    if isinstance(value, int) and value not in _INTEGERS:
        raise SpecError(f"a whole number is below 2**63, not one of {value.bit_length()} bits",
                        mark=mark)
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
