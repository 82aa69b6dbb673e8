"""Reading, columns, labels, splits, and everything that data can be wrong in."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from peftref.errors import DataError
from peftref.training.data import TaskData, load_data
from peftref.training.recognise import infer_columns
from peftref.training.rows import read_splits
from peftref.training.settings import DataSettings, Task

ROWS = [{"text": f"line {n}, with a comma", "label": "yes" if n % 3 else "no"} for n in range(30)]


def load(source: Path | str, task: Task = "auto", **changes: object) -> TaskData:
    return load_data(DataSettings.model_validate({"source": str(source), **changes}), task)


def json_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return json_lines(path, ROWS)  # pyright: ignore[reportArgumentType]
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS))
    elif kind == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_data(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    data = load(write(tmp_path, kind))
    reference = load(write(tmp_path / "a", "jsonl"))
    assert data.splits == reference.splits
    assert data.fingerprint == reference.fingerprint
    assert data.label_names == ("no", "yes")
    rows = {(row.text, data.label_names[int(row.label or 0)])
            for split in data.splits.values() for row in split}
    assert rows == {(row["text"], row["label"]) for row in ROWS}


def test_trec_is_the_distinct_questions_of_its_source() -> None:
    data = load("trec6")
    rows = [row for split in data.splits.values() for row in split]
    assert len(rows) == len({row.text for row in rows}) == 5381
    assert data.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    for row in data.split("train"):
        assert row.text


def test_splits_are_disjoint_stratified_and_repeatable(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"t{n}", "label": "rare" if n % 20 == 0 else "common"} for n in range(400)
    ]
    rows += rows[:40]  # repeats, which must stay on one side
    path = json_lines(tmp_path / "rows.jsonl", rows)
    first, second = load(path), load(path)
    assert first.splits == second.splits
    assert load(path, seed=1).fingerprint != first.fingerprint
    texts = {name: {row.text for row in split} for name, split in first.splits.items()}
    assert set(texts) == {"train", "validation", "test"}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert set.union(*texts.values()) == {str(row["text"]) for row in rows}
    rare = first.label_names.index("rare")
    for name in ("validation", "test"):
        distinct = {(row.text, row.label) for row in first.split(name)}
        assert Counter(label == rare for _, label in distinct) == {False: 38, True: 2}


def test_a_folder_keeps_its_own_splits_and_tells_of_repeats(tmp_path: Path) -> None:
    some = json_lines(tmp_path / "train.jsonl", [dict(row) for row in ROWS])
    json_lines(tmp_path / "dev.jsonl", [dict(row) for row in ROWS[:3]])
    json_lines(tmp_path / "test.jsonl", [{"text": "new", "label": "no"}])
    data = load(tmp_path)
    assert [len(split) for split in data.splits.values()] == [30, 3, 1]
    assert any("3 of 3 validation texts also occur in train" in note for note in data.notes)
    some.unlink()
    with pytest.raises(DataError, match="no training file"):
        load(tmp_path)


def test_numbers_sort_as_numbers_and_one_class_has_one_name(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"sentence": f"t{n}", "label": (n % 11 if n % 2 else float(n % 11))} for n in range(110)
    ]
    data = load(json_lines(tmp_path / "rows.jsonl", rows))
    assert data.label_names == tuple(str(number) for number in range(11))
    assert data.columns.text == "sentence"


def test_pairs_quantities_and_prompts_are_told_apart(tmp_path: Path) -> None:
    pairs: list[dict[str, object]] = [
        {"premise": f"p{n}", "hypothesis": "h", "score": n / 7} for n in range(40)
    ]
    data = load(json_lines(tmp_path / "pairs.jsonl", pairs))
    assert (data.columns.task, data.columns.pair) == ("regression", "hypothesis")
    found = [float(row.label or 0) for split in data.splits.values() for row in split]
    assert sorted(found) == [n / 7 for n in range(40)]
    prompts: list[dict[str, object]] = [{"mr": f"m{n}", "ref": f"r{n}"} for n in range(40)]
    path = json_lines(tmp_path / "prompts.jsonl", prompts)
    data = load(path, text="mr", target="ref")
    assert data.columns.task == "causal_lm"
    assert {(row.text, row.label) for row in data.split("train")} <= {
        (row["mr"], row["ref"]) for row in prompts
    }


@pytest.mark.parametrize(("rows", "changes", "message"), [
    ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], {}, r"rows.jsonl:2: column 'text'"),
    ([{"text": "a", "label": "x"}, {"text": "b"}], {}, r"rows.jsonl:2: column 'label' is empty"),
    ([{"text": f"{n}", "label": "x"} for n in range(20)], {}, "nothing to learn"),
    ([{"text": "a", "label": "x"}], {"label": "lable"}, "Did you mean 'label'"),
    ([{"foo": "a", "bar": "b", "label": "x"}], {}, "cannot tell which column is the text"),
    ([{"text": "a", "label": n} for n in range(60)], {}, "say whether they are classes"),
    ([{"text": f"t{n}", "y": "a"} for n in range(9)], {"target": "y", "label": "y"},
     "is for task causal_lm"),
    ([], {}, "no rows"),
    ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {}, "too few"),
])
def test_wrong_rows_are_named(
    tmp_path: Path, rows: list[dict[str, object]], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(json_lines(tmp_path / "rows.jsonl", rows), **changes)


def test_a_label_that_training_never_saw_is_named_with_its_place(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", [dict(row) for row in ROWS])
    json_lines(tmp_path / "test.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "?"}])
    with pytest.raises(DataError, match=r"test.jsonl:2: label '\?' does not occur"):
        load(tmp_path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: not a JSON object"):
        load(tmp_path / "bad.jsonl")
    (tmp_path / "bad.csv").write_text("text,label\none, two, yes\n")
    with pytest.raises(DataError, match=r"bad.csv:2: more fields"):
        load(tmp_path / "bad.csv")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match="not a readable parquet"):
        load(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="No file or folder"):
        load(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "latin.csv")
    with pytest.raises(DataError, match="could not be loaded"):
        load("nobody/nothing")


def test_rows_with_something_missing_are_refused_or_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [dict(row) for row in ROWS]
    rows[3]["text"], rows[5]["label"], rows[7]["label"] = " ", None, float("nan")
    path = json_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:4: column 'text' is empty.*drop_missing"):
        load(path)
    data = load(path, drop_missing=True)
    assert sum(len(split) for split in data.splits.values()) == len(ROWS) - 3
    (note,) = [note for note in data.notes if "left out" in note]
    assert re.search(r"3 of 30 rows .*first is .*:4; empty: 'text' in 1, 'label' in 2", note)
    for row in rows:
        row["label"] = None
    with pytest.raises(DataError, match="missing in every row"):
        load(json_lines(path, rows), "classification", drop_missing=True)


def test_a_rare_class_is_told(tmp_path: Path) -> None:
    """Below a tenth of an even share: of two classes, below a twentieth."""
    for count, warned in ((30, False), (15, True)):
        rows: list[dict[str, object]] = [
            {"text": f"t{n}", "label": "rare" if n < count else "common"} for n in range(480)
        ]
        data = load(json_lines(tmp_path / "rows.jsonl", rows))
        kept = sum(data.label_names[int(str(row.label))] == "rare" for row in data.split("train"))
        notes = [note for note in data.notes if note.startswith("warning: rare labels")]
        assert bool(notes) == (kept < 0.1 * len(data.split("train")) / 2) == warned
        if notes:
            assert f"'rare' ({kept} of {len(data.split('train'))}" in notes[0]


@pytest.mark.parametrize(("row", "changes", "task"), [
    ({"tokens": ["a", "b"], "ner_tags": ["O", "B-x"]}, {}, "token_classification"),
    ({"tokens": ["a", "b"], "tags": ["O", "O"], "label": "x"}, {}, "classification"),
    ({"text": "a", "labels": ["x"]}, {}, "multilabel"),
    ({"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0}, {},
     "multiple_choice"),
    ({"ctx": "a", "endings": ["b", "c"], "label": "1"}, {}, "multiple_choice"),
    ({"image": [[0, 1], [2, 3]], "label": "x"}, {}, "image_classification"),
    ({"text": "a", "out": "b"}, {"target": "out"}, "causal_lm"),
])
def test_columns_tell_the_task(
    tmp_path: Path, row: dict[str, object], changes: dict[str, object], task: str
) -> None:
    table = read_splits(str(json_lines(tmp_path / "rows.jsonl", [row])))["train"]
    found = infer_columns(table, DataSettings.model_validate({"source": "", **changes}), "auto")
    assert found.task == task
    if "choice1" in row:
        assert (found.text, found.choices) == ("premise", ("choice1", "choice2"))


@pytest.mark.parametrize(("task", "row", "message"), [
    ("token_classification", {"tokens": ["a", "b"], "tags": ["O"]},
     r":1: .*'tags' must hold a list with a label for each of the 2 words, not 1 labels"),
    ("token_classification", {"text": "a b", "label": "O"}, r":1: .* must hold a list of words"),
    ("multilabel", {"text": "a", "label": "x|y"}, r":1: .*data.separator"),
    ("multiple_choice", {"text": "a", "choices": ["b", "c"], "label": 2}, r":1: .*from 0 to 1"),
    ("multiple_choice", {"text": "a", "label": 2}, r"which column is the choices"),
    ("similarity", {"text1": "a", "text2": "b", "score": 4.2}, r":1: a cosine lies between"),
    ("retrieval", {"text": "a"}, r"which column is the pair"),
    ("image_classification", {"image": "none.png", "label": "x"}, r":1: no picture .*none.png"),
    ("image_classification", {"image": [[0, 300]], "label": "x"}, r":1: .*from 0 to 255"),
    ("seq2seq", {"text": "a", "ref": "b"}, r"say with data.target"),
])
def test_what_a_task_cannot_take_is_named(
    tmp_path: Path, task: Task, row: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(json_lines(tmp_path / "rows.jsonl", [row] * 30), task)


def test_a_column_of_another_task_is_refused(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "rows.jsonl", [dict(row) for row in ROWS])
    with pytest.raises(DataError, match=r"'pair' is for task .*similarity; task token_.* text"):
        load(path, "token_classification", pair="text")


def test_separated_labels_are_as_lists(tmp_path: Path) -> None:
    sets = [["x"], ["y", "x"], [], ["z"]]
    rows: list[dict[str, object]] = [{"text": f"t{n}", "label": sets[n % 4]} for n in range(40)]
    joined: list[dict[str, object]] = [{**row, "label": "|".join(sets[n % 4])}
                                       for n, row in enumerate(rows)]
    listed = load(json_lines(tmp_path / "a.jsonl", rows))
    cut = load(json_lines(tmp_path / "b.jsonl", joined), "multilabel", separator="|")
    assert listed.label_names == cut.label_names == ("x", "y", "z")
    assert listed.splits == cut.splits
