"""Which output rows of a fused projection belong to which role."""

from __future__ import annotations

from peftref.backbone.site_table import RowSlice

__all__ = ["row_slice"]


def row_slice(
    rule: str, part: int, total: int, heads: int, key_value_heads: int, width: int,
    value_width: int = 0,
) -> RowSlice | None:
    """Return the rows of ``part`` under ``rule``; None if the rule makes no ``total`` rows.

    With H heads, G key-value heads and head width D, the parts of query, key and value::

        halves, thirds     that many equal blocks
        gqa                [H*D | G*D | G*D]
        multi_query        gqa with G = 1
        head_interleaved   H groups of [D | D | D]
        grouped            G groups of [H/G*D | D | D]
        alternating        row by row
        latent             H groups of [key | value], of key and value alone
    """
    if rule in ("halves", "thirds"):
        parts = 2 if rule == "halves" else 3
        groups, lengths = 1, [total // parts] * parts
    elif rule == "alternating":
        groups, lengths = total // 2, [1, 1]
    elif rule == "latent":
        groups, lengths = heads, [total // heads - value_width, value_width]
    elif rule == "head_interleaved":
        groups, lengths = heads, [width] * 3
    elif rule == "grouped":
        groups, lengths = key_value_heads, [heads // key_value_heads * width, width, width]
    else:
        shared = 1 if rule == "multi_query" else key_value_heads
        groups, lengths = 1, [heads * width, shared * width, shared * width]
    size = sum(lengths)
    if groups * size != total or part >= len(lengths):
        return None
    return RowSlice(groups, size, sum(lengths[:part]), lengths[part])
