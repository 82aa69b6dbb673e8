"""Token rows, their order and their padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftref.training.backbone import load_tokenizer
from peftref.training.columns import Columns
from peftref.training.encode import Collator, Encoded, training_order
from peftref.training.example import Example
from peftref.training.tasks.base import Setup, task_of
from tests.training.assets import bert_folder, llama_folder


@given(st.lists(st.integers(1, 40), min_size=1, max_size=70), st.integers(1, 9),
       st.integers(1, 30), st.integers(0, 3))
def test_every_row_is_seen_once_an_epoch_and_the_order_is_a_prefix(
    lengths: list[int], batch: int, steps: int, seed: int
) -> None:
    order = training_order(lengths, batch, steps, seed)
    assert len(order) == batch * steps
    assert order == training_order(lengths, batch, steps + 5, seed)[: len(order)]
    counts = Counter(order)
    # Rows that fill no batch wait for the next epoch, so counts differ by one epoch at most
    # plus the part of the epoch that is cut off.
    assert max(counts.values()) - min((counts[row] for row in range(len(lengths))), default=0) <= 2
    whole = len(lengths) // batch * batch
    if whole == len(lengths):
        for start in range(0, len(order) - whole + 1, whole):
            assert sorted(order[start:start + whole]) == list(range(whole))


def test_batches_group_lengths() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 100, (3200,), generator=draw).tolist()
    order = training_order(lengths, 32, 100, 0)
    padded = sum(32 * max(lengths[row] for row in order[at:at + 32]) for at in range(0, 3200, 32))
    shuffled = torch.randperm(3200, generator=draw).tolist()
    random = sum(
        32 * max(lengths[row] for row in shuffled[at:at + 32]) for at in range(0, 3200, 32)
    )
    assert padded < 1.05 * sum(lengths) < 0.6 * random


def test_a_batch_is_padded_to_its_longest_row() -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 2},
            {"input_ids": [8], "attention_mask": [1], "labels": 0}]
    batch = Collator(63)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 63, 63]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].dtype == torch.long
    assert Collator(0, labels=torch.float32)(rows)["labels"].dtype == torch.float32


def encode(
    examples: list[Example], tokenizer: object, columns: Columns, length: int
) -> Encoded:
    return task_of(columns.task).encode(examples, Setup(tokenizer, columns, (), length))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return bert_folder(root / "bert"), llama_folder(root / "llama")


def test_rows_that_are_cut_are_counted(folders: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(folders[0]))
    examples = [Example(" ".join(["w1"] * count), None, 0) for count in (2, 6, 7, 30)]
    encoded = encode(examples, tokenizer, Columns("classification", "text"), 8)
    assert encoded.lengths == (4, 8, 8, 8)  # [CLS] and [SEP] included
    assert encoded.truncated == 2


def test_only_the_continuation_is_scored(folders: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(folders[1]))
    columns = Columns("causal_lm", "text", target="target")
    row = encode([Example("w1 w2", None, "w3")], tokenizer, columns, 16).rows[0]
    text = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert text == ["w1", "w2", "w3", "[SEP]"]
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    cut = encode([Example("w1 w2 w4 w5", None, "w3")], tokenizer, columns, 4)
    assert tokenizer.convert_ids_to_tokens(cut.rows[0]["input_ids"]) == ["w4", "w5", "w3", "[SEP]"]
    assert cut.truncated == 1
    plain = encode([Example("w1 w2")], tokenizer, Columns("causal_lm", "text"), 16).rows[0]
    assert plain["labels"] == plain["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plain["input_ids"]) == ["w1", "w2", "[SEP]"]


def test_words_begin_as_they_do_within_a_text(tmp_path: Path) -> None:
    """A byte-level tokenizer marks the space before a word, which a list of words has not."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = trainers.BpeTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    inner.train_from_iterator(["we go to new york"] * 3, learner)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), words=True)
    columns = Columns("token_classification", "tokens", label="tags")
    example = Example(words=("new", "york"), label=(0, 0))
    row = encode([example], tokenizer, columns, 16).rows[0]
    assert row["input_ids"] == load_tokenizer(str(tmp_path))(" new york")["input_ids"]
    assert len(row["input_ids"]) == 2


def test_a_label_stands_at_the_first_token_of_its_word(folders: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(folders[0]), words=True)
    columns = Columns("token_classification", "tokens", label="tags")
    example = Example(words=("w1", "w2 w3", "w4"), label=(5, 6, 7))  # the second has two tokens
    assert encode([example], tokenizer, columns, 16).rows[0]["labels"] == [
        -100, 5, 6, -100, 7, -100
    ]
    cut = encode([example], tokenizer, columns, 4)
    assert cut.rows[0]["labels"] == [-100, 5, 6, -100]
    assert cut.truncated == 1
