"""A text to go on from: language modelling, or a continuation that is learnt."""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftref.training.columns import Columns, infer_text
from peftref.training.encode import IGNORED, Encoded, Row
from peftref.training.example import Example
from peftref.training.metrics import perplexity
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings
from peftref.training.tasks.base import Named, Place, Setup, Task, tasks, text_of

__all__ = ["CausalLM", "shown_and_learnt"]

SEPARATOR = "\n"  # between a prompt and the continuation that is learnt


def shown_and_learnt(
    row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
) -> Example:
    """Return a text and, of labelled rows, the text that is learnt."""
    text = text_of(row, columns.text, place)
    if names is None or columns.target is None:
        return Example(text)
    return Example(text, label=text_of(row, columns.target, place))


@tasks.register("causal_lm")
class CausalLM(Task):
    """A model sees ``text``, or ``text``, a line break and ``target``, which alone is scored."""

    name = "causal_lm"
    head = "causal_lm"
    meanings = ("text", "target")
    metrics = ("loss", "perplexity")

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find the text."""
        text, _ = infer_text(table, data, {data.target})
        return Columns(self.name, text, target=data.target)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read prompt and continuation."""
        return shown_and_learnt(row, columns, names, place)

    def outputs(self, names: Sequence[str]) -> int | None:
        """As many as the vocabulary has."""
        return None

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise prompts and continuations; a sequence ends with the end token, if any."""
        rows = [_row(each, setup.processor, setup.max_length) for each in examples]
        return Encoded.of([row for row, _ in rows], sum(cut for _, cut in rows))

    def weight(self, inputs: Mapping[str, Tensor]) -> int:
        """Scored tokens; the first token of a row has nothing that predicts it."""
        return int((inputs["labels"][:, 1:] != IGNORED).sum())

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The loss says it all."""
        return ()

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Loss of a token, and its exponential."""
        return {"loss": loss, "perplexity": perplexity(loss)}

    def predict(
        self, model: PreTrainedModel, examples: Sequence[Example], setup: Setup, batch: int,
        tokens: int,
    ) -> Iterator[dict[str, Any]]:
        """Write on, greedily."""
        # One row at a time needs no padding on the left, which not every composition can take.
        tokenizer = setup.processor
        for example in examples:
            prompt = _prompt(example.text, tokenizer) if setup.columns.target else list(
                tokenizer(example.text)["input_ids"]
            )
            ids = torch.tensor([prompt], device=model.device)
            with torch.no_grad():
                written = cast("Any", model).generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                    do_sample=False, pad_token_id=tokenizer.pad_token_id,
                )
            new = written[0, ids.shape[1]:]
            yield {"completion": tokenizer.decode(new, skip_special_tokens=True).strip()}


def _prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, as training sees them before the target."""
    return list(tokenizer(text + SEPARATOR)["input_ids"])


def _row(example: Example, tokenizer: Any, limit: int) -> tuple[Row, bool]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.label is None:
        tokens = list(tokenizer(example.text)["input_ids"])
        tokens += end if tokens[-1:] != end else []
        row = tokens[:limit]
        return {"input_ids": row, "attention_mask": [1] * len(row), "labels": row}, tokens != row
    prompt = _prompt(example.text, tokenizer)
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
