"""A text made of a text: summaries, translations, descriptions of data."""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from peftref.errors import DataError
from peftref.training.columns import Columns, infer_text
from peftref.training.encode import IGNORED, Collator, Encoded, Row, encode_texts
from peftref.training.example import Example
from peftref.training.metrics import perplexity
from peftref.training.rows import Cell, Table
from peftref.training.scoring import evaluating
from peftref.training.settings import DataSettings
from peftref.training.tasks.base import Named, Place, Setup, Task, tasks
from peftref.training.tasks.causal_lm import shown_and_learnt
from peftref.training.writing import WRITTEN, written_scores

__all__ = ["Seq2Seq"]


@tasks.register("seq2seq")
class Seq2Seq(Task):
    """An encoder reads ``text``, a decoder writes ``target``.

    Rows with one text are references for one written text, and metrics count it once.
    """

    name = "seq2seq"
    head = "seq2seq_lm"
    meanings = ("text", "target")
    metrics = ("loss", "perplexity")
    written = WRITTEN

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find the text; the target is given."""
        if data.target is None:
            raise DataError(
                f"{table.source}: say with data.target which column is to be written; columns: "
                f"{', '.join(table.columns)}"
            )
        text, _ = infer_text(table, data, {data.target})
        return Columns(self.name, text, target=data.target)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read source and target."""
        return shown_and_learnt(row, columns, names, place)

    def outputs(self, names: Sequence[str]) -> int | None:
        """As many as the vocabulary has."""
        return None

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise sources and targets, each up to the length limit."""
        tokenizer, limit = setup.processor, setup.max_length
        coded, cut = encode_texts([each.text for each in examples], None, tokenizer, limit)
        rows: list[Row] = []
        truncated = 0
        for row, example, short in zip(coded, examples, cut, strict=True):
            kept = {name: row[name] for name in ("input_ids", "attention_mask")}
            if example.label is None:
                rows.append(kept)
                truncated += short
                continue
            labels = list(tokenizer(text_target=str(example.label))["input_ids"])
            rows.append(kept | {"labels": labels[:limit]})
            truncated += short or len(labels) > limit
        return Encoded.of(rows, truncated)

    def weight(self, inputs: Mapping[str, Tensor]) -> int:
        """Tokens of the targets."""
        return int((inputs["labels"] != IGNORED).sum())

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The loss says it all."""
        return ()

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Loss of a token, and its exponential."""
        return {"loss": loss, "perplexity": perplexity(loss)}

    def measure_written(
        self, model: PreTrainedModel, examples: Sequence[Example], setup: Setup, batch: int
    ) -> dict[str, float]:
        """Write a text for each source and compare it with all its targets."""
        references: dict[str, list[str]] = {}
        for each in examples:
            references.setdefault(each.text, []).append(str(each.label))
        sources = [Example(text) for text in references]
        said = self.predict(model, sources, setup, batch, setup.max_length)
        return written_scores([row["completion"] for row in said], list(references.values()))

    def predict(
        self, model: PreTrainedModel, examples: Sequence[Example], setup: Setup, batch: int,
        tokens: int,
    ) -> Iterator[dict[str, Any]]:
        """Write greedily."""
        encoded = self.encode(examples, setup)
        collate = Collator(setup.processor.pad_token_id)
        for start in range(0, len(encoded.rows), batch):
            inputs = {name: value.to(model.device) for name, value in
                      collate(encoded.rows[start:start + batch]).items()}
            with evaluating(model):
                written = cast("Any", model).generate(
                    **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1
                )
            texts = setup.processor.batch_decode(written, skip_special_tokens=True)
            yield from ({"completion": text.strip()} for text in texts)
