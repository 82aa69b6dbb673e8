"""What a saved artifact is worth on data, and what it says about new rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from peftref.errors import ArtifactError, DataError
from peftref.training.columns import Columns
from peftref.training.data import Example, examples_of, load_data
from peftref.training.encode import Collator, Row, encode, prompt_tokens
from peftref.training.restore import Opened
from peftref.training.rows import read_splits
from peftref.training.scoring import class_scores, score_rows
from peftref.training.settings import DataSettings

__all__ = ["Evaluated", "collator_of", "evaluate_artifact", "predict_rows", "rows_of"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Scores of a split: its name, its rows, and loss and metrics."""

    split: str
    rows: int
    metrics: Mapping[str, float]


def evaluate_artifact(
    opened: Opened, source: str | None, split: str | None, *, batch_size: int = 64
) -> Evaluated:
    """Score an artifact.

    Args:
        opened: the artifact on its backbone.
        source: data as in a run file; None: what it was trained on, split as then. A single file
            is scored whole.
        split: None: ``test``, or ``validation`` where there is no test.
        batch_size: rows at once.

    Raises:
        DataError: the data lack a column, a value or the split, or have unknown labels.
    """
    name, examples = _examples(opened, source, split)
    columns, length = columns_of(opened), _max_length(opened)
    encoded = encode(examples, opened.tokenizer, columns, length)
    metrics = score_rows(
        opened.model, encoded.rows, collator_of(opened), opened.head.task, batch_size
    )
    return Evaluated(name, len(examples), metrics)


def rows_of(
    opened: Opened, source: str | None, split: str | None, *, labelled: bool = True
) -> tuple[Row, ...]:
    """Return data as tokens, chosen as `evaluate_artifact` does; labels need not be there."""
    _, examples = _examples(opened, source, split, labelled=labelled)
    return encode(examples, opened.tokenizer, columns_of(opened), _max_length(opened)).rows


def _examples(
    opened: Opened, source: str | None, split: str | None, *, labelled: bool = True
) -> tuple[str, tuple[Example, ...]]:
    metadata = opened.artifact.metadata
    run: Mapping[str, Any] = metadata.get("run", {})
    if source is None and "data" not in run:
        path = opened.artifact.path
        raise DataError(f"{path} does not say what it was trained on; name the data")
    if source is None or source == run.get("data", {}).get("source"):
        data = load_data(DataSettings.model_validate(run["data"]), opened.head.task)
        known = metadata.get("data", {}).get("fingerprint")
        if known is not None and known != data.fingerprint:
            raise DataError(
                f"{data.source} is not what it was in training, so its {split or 'test'} rows may "
                "have been trained on; name other data"
            )
        name = _pick(split, data.splits)
        return name, data.split(name)
    tables = read_splits(source)
    columns = columns_of(opened)
    whole = split is None and list(tables) == ["train"] and Path(source).is_file()
    name = "all" if whole else _pick(split, tables)
    if not whole and name not in tables:
        raise DataError(f"{source} has no {name} split; it has {', '.join(tables)}")
    table = tables["train" if whole else name]
    return name, examples_of(table, columns, opened.head.label_names, labelled=labelled)


def _pick(split: str | None, known: Iterable[str]) -> str:
    return split or ("test" if "test" in known else "validation")


def columns_of(opened: Opened) -> Columns:
    """Return the columns that the artifact was trained on.

    Raises:
        ArtifactError: it was saved without them.
    """
    stated = opened.artifact.metadata.get("columns")
    if stated is None:
        raise ArtifactError(f"{opened.artifact.path} does not say which columns it was trained on")
    return Columns(**stated)


def _max_length(opened: Opened) -> int:
    return int(opened.artifact.metadata.get("max_length", 128))


def collator_of(opened: Opened) -> Collator:
    """Return what makes batches of rows for an artifact's model."""
    return Collator(
        opened.tokenizer.pad_token_id, regression=opened.head.task == "regression"
    )


def predict_rows(
    opened: Opened, rows: Iterable[Mapping[str, Any]], *, batch_size: int = 64, tokens: int = 64
) -> Iterator[dict[str, Any]]:
    """Yield each row with what the model says of it, in order.

    A class comes as ``label`` and ``probability``, a quantity as ``value``, a continuation
    as ``completion``.

    Args:
        opened: the artifact on its backbone.
        rows: mappings with the text columns of training.
        batch_size: rows at once.
        tokens: longest completion.

    Raises:
        DataError: a row lacks a text.
    """
    columns = columns_of(opened)
    done = 0
    queue = iter(rows)
    while chunk := list(islice(queue, batch_size * 8)):
        examples = [_example(row, columns, done + n) for n, row in enumerate(chunk, start=1)]
        done += len(chunk)
        if opened.head.task == "causal_lm":
            said = _completions(opened, examples, tokens)
        else:
            said = _classes(opened, examples, columns, batch_size)
        for row, answer in zip(chunk, said, strict=True):
            yield {**row, **answer}


def _example(row: Mapping[str, Any], columns: Columns, number: int) -> Example:
    for name in (columns.text, columns.pair):
        if name is not None and not isinstance(row.get(name), str | list):
            raise DataError(
                f"row {number}: no text in column {name!r}; columns: {', '.join(row) or 'none'}"
            )
    texts = [
        " ".join(map(str, value)) if isinstance(value := row[name], list) else str(value)
        for name in (columns.text, columns.pair) if name is not None
    ]
    return Example(texts[0], texts[1] if len(texts) > 1 else None)


def _classes(
    opened: Opened, examples: Sequence[Example], columns: Columns, batch_size: int
) -> Iterator[dict[str, Any]]:
    encoded = encode(examples, opened.tokenizer, columns, _max_length(opened))
    outputs = class_scores(opened.model, encoded.rows, collator_of(opened), batch_size)
    if opened.head.task == "regression":
        yield from ({"value": float(value)} for value in outputs.reshape(-1))
        return
    for row in outputs.softmax(-1):
        best = int(row.argmax())
        yield {"label": opened.head.label_names[best], "probability": round(float(row[best]), 6)}


def _completions(
    opened: Opened, examples: Sequence[Example], tokens: int
) -> Iterator[dict[str, Any]]:
    # One row at a time needs no padding on the left, which not every composition can take.
    with_target = columns_of(opened).target is not None
    for example in examples:
        prompt = prompt_tokens(example.text, opened.tokenizer) if with_target else list(
            opened.tokenizer(example.text)["input_ids"]
        )
        ids = torch.tensor([prompt], device=opened.model.device)
        with torch.no_grad():
            written = cast("Any", opened.model).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=opened.tokenizer.pad_token_id,
            )
        new = written[0, ids.shape[1]:]
        yield {"completion": opened.tokenizer.decode(new, skip_special_tokens=True).strip()}
