"""The fields of a file whose written form is shorter than the model's."""

from __future__ import annotations

from collections.abc import Callable

from peftref.spec.functions import MacroExpander, canonical_entry, canonical_function
from peftref.spec.loader import Node

__all__ = ["canonical_composition", "canonical_technique"]


def canonical_technique(node: Node, expand: MacroExpander) -> Node:
    """Return a technique whose functions and procedures are in the model's form.

    Args:
        node: the technique, placeholders replaced.
        expand: replaces macros.
    """
    def module(item: Node) -> Node:
        return _changed(item, "function", lambda node: canonical_function(node, expand))

    node = _changed(node, "modules", lambda modules: _each(modules, module))
    return _changed(node, "procedures", lambda items: _each(items, _procedure))


def canonical_composition(node: Node) -> Node:
    """Return a composition whose couplings, procedures and resolved members are in model form."""
    def member(item: Node) -> Node:
        return _changed(item, "technique", lambda node: canonical_technique(node, _no_macros))

    node = _changed(node, "members", lambda items: _each(items, member))
    node = _changed(node, "couplings", lambda items: _each(items, _coupling))
    return _changed(node, "procedures", lambda items: _each(items, _procedure))


def _no_macros(name: str, arguments: Node) -> None:
    """Resolved specs hold no macros: a name in them is a primitive's."""


def _procedure(node: Node) -> Node:
    return canonical_entry(node, with_members=False)


def _coupling(node: Node) -> Node:
    return canonical_entry(node, with_members=True)


def _changed(node: Node, key: str, change: Callable[[Node], Node]) -> Node:
    if not node.is_mapping or key not in node.value:
        return node
    return node.replaced({**node.value, key: change(node.value[key])})


def _each(node: Node, change: Callable[[Node], Node]) -> Node:
    """Change the items of a list; leave anything else for the model to refuse."""
    if not isinstance(node.value, tuple):
        return node
    return node.replaced([change(item) for item in node.value])
