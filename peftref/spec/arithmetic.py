"""Arithmetic over parameters: the text between ``${`` and ``}``.

A subset of Python's expressions, evaluated over its syntax tree: numbers, text, parameter names,
``+ - * / // **``, comparisons, ``and or not``, and calls of ``sqrt``, ``min``, ``max``. There is
no attribute, no subscript and no other call, and every intermediate number is bounded, so that a
file from elsewhere can neither reach the interpreter nor keep it busy.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping

from peftref.errors import unknown_name

__all__ = ["FUNCTIONS", "evaluate", "names_in"]

Value = bool | int | float | str | None
Number = int | float



def _sqrt(value: Number) -> float:
    if value < 0:
        raise ValueError(f"sqrt takes a number that is not negative, not {value}")
    return math.sqrt(value)


FUNCTIONS: Mapping[str, Callable[..., Number]] = {"sqrt": _sqrt, "min": min, "max": max}
LONGEST_SOURCE = 300
LARGEST_EXPONENT = 64
LARGEST_NUMBER = 2.0**63

_BINARY: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[..., bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _parse(source: str) -> ast.expr:
    """Return the syntax tree of ``source``; ValueError when it is not an expression."""
    if len(source) > LONGEST_SOURCE:
        raise ValueError(f"arithmetic is at most {LONGEST_SOURCE} characters, not {len(source)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "1and 2": the message below says more
            return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source!r} is not an arithmetic expression") from error


def names_in(source: str) -> frozenset[str]:
    """Return the parameter names that ``source`` reads.

    Raises:
        ValueError: ``source`` is not an expression.
    """
    tree = _parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    called = {node.func.id for node in ast.walk(tree)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return frozenset(names - called)


def evaluate(source: str, values: Mapping[str, Value]) -> Value:
    """Return the value of ``source`` where a name means ``values[name]``.

    Args:
        source: the text between ``${`` and ``}``.
        values: parameter values by name.

    Raises:
        ValueError: not an expression, not allowed here, an unknown name, or out of bounds.
    """
    try:
        return _value(_parse(source), values)
    except ZeroDivisionError as error:
        raise ValueError(f"{source!r} divides by zero") from error
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source!r} cannot be computed: {error}") from error


def _value(node: ast.expr, values: Mapping[str, Value]) -> Value:
    match node:
        case ast.Constant(value=bool() | str() as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.Name(id=name):
            if name not in values:
                raise ValueError(unknown_name("parameter", name, values))
            return values[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _binary(op, _number(left, values), _number(right, values))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, values)
        case ast.BoolOp(op=op, values=operands):
            decides = any if isinstance(op, ast.Or) else all
            return decides(bool(_value(operand, values)) for operand in operands)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]):
            if name not in FUNCTIONS:
                raise ValueError(unknown_name("arithmetic function", name, FUNCTIONS))
            return _bounded(FUNCTIONS[name](*(_number(a, values) for a in arguments)))
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed in arithmetic; there are "
                             "+ - * / // **, comparisons, and/or/not, sqrt, min, max")


def _number(node: ast.expr, values: Mapping[str, Value]) -> Number:
    value = _value(node, values)
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"{ast.unparse(node)!r} is {value!r}, not a number"
        raise ValueError(message)  # noqa: TRY004 - bad input, not a bug
    return value


def _binary(op: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
        raise ValueError(f"an exponent is at most {LARGEST_EXPONENT}, not {right}")
    return _bounded(_BINARY[type(op)](left, right))


def _bounded(value: Number) -> Number:
    if isinstance(value, complex) or not abs(value) <= LARGEST_NUMBER:
        # An integer of many digits has no decimal text.
        shown = hex(value) if isinstance(value, int) else repr(value)
        raise ValueError(f"a result must be a real number below 2**63, not {shown:.40}")
    return value
