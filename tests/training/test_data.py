"""Reading, columns, labels, splits, and everything that data can be wrong in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from peftref.errors import DataError
from peftref.training.data import TaskData, load_data
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
