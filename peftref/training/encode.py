"""Tokenise once, order rows by length-grouped batches, and pad each batch to its own width."""

# Transformers' tokenizers share no typed call.
# ruff: noqa: ANN401

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftref.errors import DataError
from peftref.training.columns import Columns
from peftref.training.data import Example

__all__ = ["Collator", "Encoded", "batches_by_length", "encode", "training_order"]

IGNORED = -100  # the label that transformers' losses leave out
SEPARATOR = "\n"  # between a prompt and the continuation that is learnt
POOL = 50  # batches that are sorted by length together

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token rows of a split and how many of them were cut to the length limit."""

    rows: tuple[Row, ...]
    truncated: int

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [len(row["input_ids"]) for row in self.rows]


def encode(
    examples: Sequence[Example], tokenizer: Any, columns: Columns, max_length: int
) -> Encoded:
    """Tokenise a split.

    A causal language model sees ``text``, or ``text``, a line break and ``target``, of which
    only the target is scored; a sequence ends with the end token if there is one.
    """
    if columns.task == "causal_lm":
        rows = [_language_row(example, tokenizer, max_length) for example in examples]
        return Encoded(tuple(row for row, _ in rows), sum(cut for _, cut in rows))
    texts = [example.text for example in examples]
    pairs = [example.pair or "" for example in examples] if columns.pair else None
    coded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    names = [name for name in coded if name != "labels"]
    rows = [
        {name: coded[name][index] for name in names} | _labels(example)
        for index, example in enumerate(examples)
    ]
    # The fast tokenizers keep what they cut off; a slow one can only be judged by its length.
    cut = [bool(item.overflowing) for item in coded.encodings] if coded.encodings else [
        len(row["input_ids"]) >= max_length for row in rows
    ]
    return Encoded(tuple(rows), sum(cut))


def _labels(example: Example) -> dict[str, Any]:
    return {} if example.label is None else {"labels": example.label}


def prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, as training sees them before the target."""
    return list(tokenizer(text + SEPARATOR)["input_ids"])


def _language_row(example: Example, tokenizer: Any, limit: int) -> tuple[Row, bool]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.label is None:
        tokens = list(tokenizer(example.text)["input_ids"])
        tokens += end if tokens[-1:] != end else []
        row = tokens[:limit]
        return {"input_ids": row, "attention_mask": [1] * len(row), "labels": row}, tokens != row
    prompt = prompt_tokens(example.text, tokenizer)
    target = list(tokenizer(str(example.label), add_special_tokens=False)["input_ids"]) + end
    kept = target[: limit - 1]
    # The end of a prompt is nearest to what is learnt, so its beginning gives way.
    head = prompt[max(0, len(prompt) + len(kept) - limit):]
    row = {
        "input_ids": head + kept,
        "attention_mask": [1] * (len(head) + len(kept)),
        "labels": [IGNORED] * len(head) + kept,
    }
    return row, len(head) + len(kept) < len(prompt) + len(target)


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
        regression: labels are quantities.
    """

    def __init__(self, pad: int, *, regression: bool = False) -> None:
        self.fill = {"input_ids": pad, "labels": IGNORED}
        self.label_type = torch.float32 if regression else torch.long

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return the batch as tensors; sequences are (B, T), other values (B,)."""
        width = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                fill = self.fill.get(name, 0)
                values = [value + [fill] * (width - len(value)) for value in values]
            kind = self.label_type if name == "labels" else torch.long
            batch[name] = torch.tensor(values, dtype=kind)
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
