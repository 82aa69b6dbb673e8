"""Text patterns with alternatives in braces: ``attention.{query,value}``."""

from __future__ import annotations

import re
from itertools import pairwise

from peftref.errors import SpecError

__all__ = ["expand_braces", "role_matches"]


def expand_braces(text: str) -> tuple[str, ...]:
    """Return every text that ``text`` stands for, in order; braces may nest.

    Raises:
        SpecError: braces that do not pair.
    """
    start = text.find("{")
    if start < 0:
        if "}" in text:
            raise SpecError(f"Pattern {text!r} has a '}}' without a '{{'")
        return (text,)
    cuts, depth = [start], 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "," and depth == 1:
            cuts.append(i)
        if depth == 0:
            cuts.append(i)
            break
    else:
        raise SpecError(f"Pattern {text!r} has a '{{' without a '}}'")
    if "}" in text[:start]:
        raise SpecError(f"Pattern {text!r} has a '}}' without a '{{'")
    head, tails = text[:start], expand_braces(text[cuts[-1] + 1 :])
    middles = [
        middle
        for left, right in pairwise(cuts)
        for middle in expand_braces(text[left + 1 : right])
    ]
    return tuple(head + middle + tail for middle in middles for tail in tails)


def role_matches(pattern: str, role: str) -> bool:
    """Return whether ``role`` is in ``pattern``: ``*`` alone is any role, else within a part."""
    if pattern == "*":
        return True
    parts = (re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split("."))
    return re.fullmatch(r"\.".join(parts), role) is not None
