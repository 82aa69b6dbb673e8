"""Prefixes of DeBERTa's attention, which calls no attention interface and takes no cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftref.lowering.cache import Prefix

__all__ = ["attend_with_rows"]


def attend_with_rows(  # noqa: PLR0913 - the signature it stands for
    module: Any,  # noqa: ANN401 - transformers' own class, whose parts have no types
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    *,
    peftref: Prefix,
) -> tuple[Tensor, Tensor | None]:
    """``DisentangledSelfAttention.forward`` with learned rows before the keys and values.

    ``softmax([q P_k^T / sqrt(f d) | (q k^T + c2p + p2c) / sqrt(f d)]) [P_v; v]`` where f is 1 and
    one more for each position term (He et al. 2021, https://arxiv.org/abs/2006.03654). Rows have
    no position, so that both position terms are 0 for them.

    Args:
        module: the attention module.
        hidden_states: (batch, tokens, d).
        attention_mask: (batch, 1, tokens, tokens); 0 is hidden.
        output_attentions: whether the weights are returned; the rows come first in them.
        query_states: what queries are made of (default: ``hidden_states``).
        relative_pos: distances of queries and keys.
        rel_embeddings: the table of relative positions.
        peftref: the rows.
    """
    peftref.used = True
    heads: int = module.num_attention_heads
    tokens = hidden_states if query_states is None else query_states
    query, key, value = (
        linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for linear, x in ((module.query_proj, tokens), (module.key_proj, hidden_states),
                          (module.value_proj, hidden_states))
    )
    kinds: list[str] = module.pos_att_type
    factor = 1 + ("c2p" in kinds) + ("p2c" in kinds)
    batch, _, count, width = query.shape
    rows = peftref.keys.shape[2]
    keys, values = (
        torch.cat((own.to(x.dtype).expand(batch, -1, -1, -1), x), 2)
        for own, x in ((peftref.keys, key), (peftref.values, value))
    )
    scores = query @ keys.mT / math.sqrt(width * factor)
    if module.relative_attention:
        positions = module.pos_dropout(rel_embeddings)
        bias = module.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), relative_pos, positions, factor)
        scores = scores + pad(bias, (rows, 0)).view(batch, heads, count, -1)
    visible = pad(attention_mask.bool(), (rows, 0), value=True)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = module.dropout(scores.softmax(-1))
    result = (weights @ values).transpose(1, 2).flatten(2)
    return result, weights if output_attentions else None
