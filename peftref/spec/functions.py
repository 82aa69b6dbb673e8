"""Functions as written to expression trees: macros replaced, places kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftref.errors import SpecError
from peftref.spec.loader import Node, node_of
from peftref.spec.technique import COMBINATORS

__all__ = ["MacroExpander", "canonical_entry", "canonical_function"]

DEEPEST_MACRO = 16

MacroExpander = Callable[[str, Node], Node | None]
"""Name and arguments of a function -> the function it stands for; None where it is no macro."""


def canonical_function(node: Node, expand: MacroExpander, depth: int = 0) -> Node:
    """Return ``{name, arguments, children, mark}`` for a function as a user writes it.

    Accepts ``name``, ``{name: {arguments}}``, ``{combinator: [children]}`` and a list (a chain).

    Raises:
        SpecError: another form, or macros that contain each other.
    """
    if isinstance(node.value, tuple):
        return _combined("chain", node, node, expand, depth)
    name, body = _named(node)
    if isinstance(body.value, tuple):
        if name not in COMBINATORS:
            raise SpecError(f"{name!r} takes a mapping of arguments, not a list; only "
                            f"{', '.join(COMBINATORS)} take a list", mark=node.mark)
        return _combined(name, body, node, expand, depth)
    if name in COMBINATORS:
        raise SpecError(f"{name!r} takes a list of functions", mark=node.mark)
    if depth > DEEPEST_MACRO:
        raise SpecError(f"macro {name!r} contains itself", mark=node.mark)
    label = body.value.get("name")
    if label is not None and (not isinstance(label.value, str) or not label.value):
        raise SpecError(f"'name' is text, not {label.value!r}", mark=label.mark)
    rest = {key: value for key, value in body.value.items() if key != "name"}
    macro = expand(name, body.replaced(rest))
    if macro is None:
        return _leaf(name, body, node)
    function = canonical_function(macro, expand, depth + 1)
    return function if label is None else _prefixed(function, label.value)


def _named(node: Node) -> tuple[str, Node]:
    """Return name and body of a one-key mapping or a bare name."""
    if isinstance(node.value, str):
        return node.value, Node({}, node.mark)
    if not node.is_mapping or len(node.value) != 1:
        raise SpecError("a function is a name, {name: {argument: value}}, {combinator: [...]} or "
                        "a list", mark=node.mark)
    (name, body), = node.value.items()
    if body.value is None:
        return name, Node({}, body.mark)
    if not isinstance(body.value, dict | tuple):
        raise SpecError(f"{name!r} takes a mapping of arguments or a list, not {body.value!r}",
                        mark=body.mark)
    return name, body


def _combined(name: str, items: Node, at: Node, expand: MacroExpander, depth: int) -> Node:
    if not items.value:
        raise SpecError(f"{name!r} needs at least one function", mark=at.mark)
    children = tuple(canonical_function(item, expand, depth) for item in items.value)
    return at.replaced({"name": Node(name, at.mark), "children": Node(children, items.mark),
                        "mark": Node(at.mark)})


def _leaf(name: str, arguments: Node, at: Node) -> Node:
    return at.replaced({"name": Node(name, at.mark), "arguments": arguments,
                        "mark": Node(at.mark)})


def _prefixed(function: Node, label: str) -> Node:
    """Put ``label.`` before the parameter names of every primitive in ``function``."""
    content = dict(function.value)
    if "children" in content:
        children = tuple(_prefixed(child, label) for child in content["children"].value)
        content["children"] = content["children"].replaced(children)
        return function.replaced(content)
    arguments = content["arguments"]
    own = arguments.value.get("name", content["name"])
    named = {**arguments.value, "name": Node(f"{label}.{own.value}", own.mark)}
    content["arguments"] = arguments.replaced(named)
    return function.replaced(content)


def canonical_entry(node: Node, *, with_members: bool) -> Node:
    """Return ``{name, arguments, mark}`` (couplings: and ``members``) for ``{name: {...}}``.

    The list of ``{name: [...]}`` is the argument of the procedure's own name.
    """
    resolved = node.is_mapping and "name" in node.value
    if resolved:
        return node.replaced({**node.value, "mark": Node(node.mark)})
    name, body = _named(node)
    if not body.is_mapping and with_members:
        raise SpecError(f"{name!r} takes a mapping of arguments", mark=body.mark)
    arguments: Mapping[str, Node] = dict(body.value) if body.is_mapping else {name: body}
    content = {"name": Node(name, node.mark), "mark": Node(node.mark)}
    if with_members:
        content["members"] = arguments.get("members", node_of((), body.mark))
        arguments = {key: value for key, value in arguments.items() if key != "members"}
    return node.replaced({**content, "arguments": body.replaced(arguments)})
