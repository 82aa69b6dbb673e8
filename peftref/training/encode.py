"""Tokenise once, order rows by length-grouped batches, and pad each batch to its own width."""

# Transformers' tokenizers share no typed call.
# ruff: noqa: ANN401

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftref.errors import DataError

__all__ = [
    "IGNORED", "Collate", "Collator", "Encoded", "GroupCollator", "Row", "batches_by_length",
    "encode_texts", "pad_token", "training_order",
]

IGNORED = -100  # the label that transformers' losses leave out
POOL = 50  # batches that are sorted by length together

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row]], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows of a split: how long each is, and how many were cut to the length limit."""

    rows: tuple[Row, ...]
    truncated: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], truncated: int) -> Encoded:
        """Return rows of tokens, each as long as it has tokens."""
        return cls(tuple(rows), truncated, tuple(len(row["input_ids"]) for row in rows))


def encode_texts(
    texts: Sequence[Any], pairs: Sequence[str] | None, tokenizer: Any, max_length: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Tokenise texts; return the rows, and whether each was cut.

    Args:
        texts: texts, or lists of words.
        pairs: second texts.
        tokenizer: of the backbone.
        max_length: of a row in tokens.
        **options: for the tokenizer.
    """
    coded = tokenizer(texts, pairs, truncation=True, max_length=max_length, **options)
    names = [name for name in coded if name != "labels"]
    rows = [{name: coded[name][index] for name in names} for index in range(len(texts))]
    # The fast tokenizers keep what they cut off; a slow one can only be judged by its length.
    cut = [bool(item.overflowing) for item in coded.encodings] if coded.encodings else [
        len(row["input_ids"]) >= max_length for row in rows
    ]
    return rows, cut


def training_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Return row numbers for ``steps`` batches, one after the other.

    Every epoch draws all rows anew, sorts pools of 50 batches by length, cuts them into batches
    and shuffles the batches; rows that do not fill a batch open the next epoch. The order
    depends on its arguments alone, so a resumed run goes on where it was.
    """
    order: list[int] = []
    carried: list[int] = []
    epoch = 0
    while len(order) < batch * steps:
        draw = random.Random(f"{seed}:{epoch}")
        drawn = list(range(len(lengths)))
        draw.shuffle(drawn)
        rows = carried + drawn
        whole = len(rows) // batch * batch
        rows, carried = rows[:whole], rows[whole:]
        grouped = [
            row
            for start in range(0, whole, POOL * batch)
            for row in sorted(rows[start:start + POOL * batch], key=lengths.__getitem__)
        ]
        cuts = [grouped[start:start + batch] for start in range(0, whole, batch)]
        draw.shuffle(cuts)
        order.extend(row for cut in cuts for row in cut)
        epoch += 1
    return order[: batch * steps]


def batches_by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Return row numbers in batches of similar length, for scoring."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start:start + batch] for start in range(0, len(order), batch)]


class Collator:
    """Pads rows on the right to the longest of the batch.

    Args:
        pad: token number to pad with.
        labels: type of the labels.
    """

    def __init__(self, pad: int, *, labels: torch.dtype = torch.long) -> None:
        self.fill = {"input_ids": pad, "labels": IGNORED}
        self.label_type = labels

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return the batch as tensors; sequences are (B, T), other values (B,)."""
        batch: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                fill, width = self.fill.get(name, 0), max(len(value) for value in values)
                values = [value + [fill] * (width - len(value)) for value in values]
            kind = self.label_type if name == "labels" else torch.long
            batch[name] = torch.tensor(values, dtype=kind)
        return batch


class GroupCollator:
    """Lays rows of several sequences under each other; ``members`` says which are whose.

    Args:
        pad: token number to pad with.
        labels: type of the labels.
    """

    def __init__(self, pad: int, *, labels: torch.dtype = torch.long) -> None:
        self.collate = Collator(pad)
        self.label_type = labels

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return sequences (N, T), ``members`` (N, 2): row and place in it, and labels (B,)."""
        flat: list[Row] = []
        members: list[tuple[int, int]] = []
        for number, row in enumerate(rows):
            names = [name for name in row if name != "labels"]
            for place in range(len(row["input_ids"])):
                flat.append({name: row[name][place] for name in names})
                members.append((number, place))
        batch = self.collate(flat) | {"members": torch.tensor(members)}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = torch.tensor(labels, dtype=self.label_type)
        return batch


def pad_token(tokenizer: Any) -> int:
    """Return the padding token's number; a tokenizer without one pads with its end token.

    Raises:
        DataError: the tokenizer has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a padding nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id  # pyright: ignore[reportReturnType]  # set just above
