"""Hold rows out once, by seed, the same way on every machine."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

__all__ = ["fingerprint", "hold_out", "shared"]


def hold_out(
    keys: Sequence[Hashable], strata: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the indices that stay and those held out, both in the order of the rows.

    Each stratum gives ``fraction`` of its distinct keys, rounded, but never its last one. Rows
    with equal keys go to the same side, so that a repeated text is not in both.

    Args:
        keys: what must not be separated (the text).
        strata: what must be represented on both sides (the class).
        fraction: share to hold out, in (0, 1).
        seed: of the draw.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    by_stratum: dict[Hashable, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_stratum[strata[members[0]]].append(members)
    held: set[int] = set()
    for stratum, units in by_stratum.items():
        # One generator a stratum: a class more or less does not move the others.
        draw = random.Random(f"{seed}:{stratum}")
        wanted = min(len(units) - 1, max(1, round(fraction * len(units))))
        held.update(index for unit in draw.sample(units, wanted) for index in unit)
    stay = [index for index in range(len(keys)) if index not in held]
    return stay, sorted(held)


def shared(train: Iterable[Hashable], other: Iterable[Hashable]) -> int:
    """Return how many rows of ``other`` have a key that occurs in ``train`` too."""
    known = set(train)
    return sum(key in known for key in other)


def fingerprint(rows: Iterable[object]) -> str:
    """Return the SHA-256 of rows in order: equal data and split, equal text."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
        digest.update(b"\n")
    return digest.hexdigest()
