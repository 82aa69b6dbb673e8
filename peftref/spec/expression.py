"""Techniques as one line of text: ``"lora(rank=16) + prefix_tuning"``.

Grammar (a subset of Python's, read by its parser and never run)::

    expression := term {"+" term}
    term       := use | coupling | "(" expression ")"
    use        := (NAME | "path.yaml") ["(" parameter=value, ... ")"]
    coupling   := NAME "(" expression, ..., argument=value, ... ")"

A coupling is a call with techniques as positional arguments. A value is a number, text, a list of
integers, or a bare name or technique, which means its own text.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from peftref.errors import Mark, SpecError

__all__ = ["Coupled", "Term", "Use", "format_expression", "parse_expression"]

LONGEST = 4000
Value = bool | int | float | str | None | tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """A technique, composition or file (``is_path``) with parameter values."""

    name: str
    values: Mapping[str, Value]
    is_path: bool = False
    mark: Mark | None = field(default=None, compare=False)
    places: Mapping[str, Mark] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Coupled:
    """A coupling over terms."""

    name: str
    terms: tuple[Term, ...]
    arguments: Mapping[str, Value]
    mark: Mark | None = field(default=None, compare=False)


Term = Use | Coupled


def parse_expression(text: str, at: Mark | None = None) -> tuple[Term, ...]:
    """Return the terms of ``text``, in order.

    Args:
        text: the expression.
        at: its place in a file; None when it was typed by itself.

    Raises:
        SpecError: with the column of what is not understood.
    """
    parser = _Parser(text, at)
    if len(text) > LONGEST:
        raise SpecError(f"an expression is at most {LONGEST} characters, not {len(text)}", mark=at)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\\." in a regular expression between quotes
            tree = ast.parse(text.strip(), mode="eval").body
        return parser.terms(tree)
    except SyntaxError as error:
        column = error.offset or 1
        raise SpecError(f"not a technique expression: {error.msg}",
                        mark=parser.mark(column)) from error
    except (RecursionError, MemoryError) as error:
        raise SpecError("not a technique expression: nested too deep",
                        mark=parser.mark(1)) from error
    except ValueError as error:
        raise SpecError(f"not a technique expression: {error}", mark=parser.mark(1)) from error


class _Parser:
    def __init__(self, text: str, at: Mark | None) -> None:
        self.text = text
        self.at = at

    def mark(self, column: int) -> Mark:
        """Return the place of a column; inside a file, that of the expression."""
        return self.at or Mark(f"<{textwrap.shorten(self.text, 60)}>", 1, column)

    def fail(self, node: ast.expr, message: str) -> SpecError:
        return SpecError(message, mark=self.mark(node.col_offset + 1))

    def terms(self, node: ast.expr) -> tuple[Term, ...]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.terms(node.left) + self.terms(node.right)
        return (self.term(node),)

    def term(self, node: ast.expr) -> Term:
        place = self.mark(node.col_offset + 1)
        match node:
            case ast.Name(id=name):
                return Use(name, {}, mark=place)
            case ast.Constant(value=str() as path):
                return Use(path, {}, is_path=True, mark=place)
            case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
                return self.use(name, keywords, place, is_path=False)
            case ast.Call(func=ast.Constant(value=str() as path), args=[], keywords=keywords):
                return self.use(path, keywords, place, is_path=True)
            case ast.Call(func=ast.Name(id=name), args=positional, keywords=keywords):
                return self.coupling(name, positional, keywords, place)
            case _:
                raise self.fail(node, f"{ast.unparse(node)!r} is no technique; write a name, "
                                "name(parameter=value), coupling(technique, ...) or 'path.yaml'")

    def use(self, name: str, keywords: list[ast.keyword], place: Mark, *, is_path: bool) -> Use:
        pairs = self.pairs(keywords)
        values = {key: self.value(node) for key, node in pairs.items()}
        places = {key: self.mark(node.col_offset + 1) for key, node in pairs.items()}
        return Use(name, values, is_path, place, places)

    def coupling(self, name: str, positional: list[ast.expr], keywords: list[ast.keyword],
                 place: Mark) -> Coupled:
        for argument in positional:
            if isinstance(argument, ast.Constant) and not isinstance(argument.value, str):
                raise self.fail(argument, f"{name} takes values by name: {name}(parameter="
                                f"{argument.value!r}); only techniques are positional")
        terms = tuple(term for argument in positional for term in self.terms(argument))
        values = {key: self.value(node) for key, node in self.pairs(keywords).items()}
        return Coupled(name, terms, values, mark=place)

    def pairs(self, keywords: list[ast.keyword]) -> dict[str, ast.expr]:
        """Return the nodes of ``name=value`` and ``**{'name': value}`` by name."""
        values: dict[str, ast.expr] = {}
        for keyword in keywords:
            pairs = [(keyword.arg, keyword.value)]
            if keyword.arg is None:
                pairs = self.spread(keyword.value)
            for name, node in pairs:
                if name is None or name in values:
                    raise self.fail(node, f"parameter {name!r} is given twice")
                values[name] = node
        return values

    def spread(self, node: ast.expr) -> list[tuple[str | None, ast.expr]]:
        """Return the pairs of ``**{'member.parameter': value}``."""
        pairs: list[tuple[str | None, ast.expr]] = []
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    pairs.append((key.value, value))
        if not isinstance(node, ast.Dict) or len(pairs) != len(node.keys):
            raise self.fail(node, "'**' takes a literal such as {'lora.rank': 4}")
        return pairs

    def value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return tuple(self.item(item) for item in items)
            case ast.Name() | ast.Attribute() | ast.Call() | ast.BinOp(op=ast.Add()):
                return ast.unparse(node)
            case _:
                raise self.fail(node, f"{ast.unparse(node)!r} is no value; write a number, text, "
                                "a list of integers or a technique")

    def item(self, node: ast.expr) -> int | str:
        value = self.value(node)
        if isinstance(value, int | str):
            return value
        raise self.fail(node, f"a list holds integers or text, not {ast.unparse(node)!r}")


def format_expression(terms: tuple[Term, ...]) -> str:
    """Return the canonical text of ``terms``; `parse_expression` reads it back equal."""
    return " + ".join(_format(term) for term in terms)


def _format(term: Term) -> str:
    if isinstance(term, Coupled):
        return f"{term.name}({', '.join([*map(_format, term.terms), *_pairs(term.arguments)])})"
    name = repr(term.name) if term.is_path else term.name
    pairs = _pairs(term.values)
    return f"{name}({', '.join(pairs)})" if pairs else name


def _pairs(values: Mapping[str, Value]) -> list[str]:
    plain = [f"{key}={_literal(value)}" for key, value in values.items() if key.isidentifier()]
    dotted = {key: value for key, value in values.items() if not key.isidentifier()}
    return plain + ([f"**{dotted!r}"] if dotted else [])


def _literal(value: Value) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
