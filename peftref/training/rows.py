"""Read labelled text from files, the embedded data set or the `datasets` library."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from peftref.errors import DataError

__all__ = ["Cell", "Table", "read_splits"]

# A list is text that is already cut into words, several labels, or a picture's rows of numbers; a
# mapping or bytes are an encoded picture.
Cell = str | int | float | bool | bytes | list[Any] | dict[str, Any] | None

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}
EMBEDDED = {"trec6": "trec6.jsonl"}
DIGITS = "digits"  # pictures of 8 x 8, packaged with scikit-learn


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split; ``lines[i]`` says where row ``i`` stands in ``source``."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Cell], ...]
    lines: tuple[int, ...]

    def place(self, index: int) -> str:
        """Return ``source:line`` of a row, for messages."""
        return f"{self.source}:{self.lines[index]}"


def read_splits(source: str) -> dict[str, Table]:
    """Return the tables of ``source`` by split name; a single file is ``train``.

    Raises:
        DataError: nothing is there, nothing is readable, or a file has no rows.
    """
    if source in EMBEDDED:
        resource = files("peftref") / "data" / EMBEDDED[source]
        text = resource.read_text(encoding="utf-8").splitlines()
        return {"train": _table(source, _json_lines(source, text))}
    if source == DIGITS:
        from peftref.training.pictures import digits

        return {"train": _table(source, iter(digits()))}
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path)}
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(
            f"No file or folder {source!r}. Give a {', '.join(SUFFIXES)} file, a folder of them "
            f"named train, validation and test, or {', '.join((*EMBEDDED, DIGITS))}"
        )
    return _read_hub(source)


def _read_folder(folder: Path) -> dict[str, Table]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = SPLIT_NAMES.get(path.stem.lower())
        if name is None or path.suffix not in SUFFIXES:
            continue
        if name in found:
            both = f"{found[name].name} and {path.name}"
            raise DataError(f"{folder}: both {both} are the {name} split; keep one")
        found[name] = path
    if not found and _has_pictures(folder):
        return _loaded(str(folder), "imagefolder", {"data_dir": str(folder)})
    if "train" not in found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"{folder}: no training file. Expected train with one of {', '.join(SUFFIXES)} (and, "
            f"if there are, validation or dev, and test); found {names}"
        )
    return {name: _read_file(path) for name, path in found.items()}


def _read_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read {suffix!r} files; valid: {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file: {error}") from None
        return _table(str(path), enumerate(rows, start=1))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    if suffix == ".json":
        return _table(str(path), _json_list(str(path), text))
    if suffix == ".jsonl":
        return _table(str(path), _json_lines(str(path), text.split("\n")))
    return _table(str(path), _separated(str(path), text, "," if suffix == ".csv" else "\t"))


def _json_list(source: str, text: str) -> Iterator[tuple[int, object]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; nested too deep
        raise DataError(f"{source}: not JSON that can be read: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{source}: expected a list of objects, found {type(content).__name__}")
    yield from enumerate(content, start=1)


def _json_lines(source: str, lines: Sequence[str]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}:{number}: not a JSON object: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}:{number}: not a JSON object: {error}") from None


def _separated(source: str, text: str, delimiter: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    names = [name for name in reader.fieldnames or () if name]
    if len(set(names)) != len(names):
        raise DataError(f"{source}:1: two columns share a name: {', '.join(names)}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{source}:{reader.line_num}: {error}") from None
        if None in row:
            raise DataError(
                f"{source}:{reader.line_num}: more fields than the {len(names)} columns of the "
                "header; quote text that contains the separator"
            )
        yield reader.line_num, {name: row[name] for name in names}


def _has_pictures(folder: Path) -> bool:
    from peftref.training.pictures import SUFFIXES as PICTURES

    files = (path for path in folder.glob("*/**/*") if path.suffix.lower() in PICTURES)
    return next(files, None) is not None


def _read_hub(source: str) -> dict[str, Table]:
    name, _, configuration = source.partition(":")
    return _loaded(source, name, {"name": configuration or None})


def _loaded(source: str, name: str, options: Mapping[str, Any]) -> dict[str, Table]:
    """Return what the `datasets` library gives for a name."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, **options)
    # The library raises whatever its readers, its cache and the network raise.
    except Exception as error:  # noqa: BLE001
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source!r} is no file, no folder and not {', '.join((*EMBEDDED, DIGITS))}; as a data "
            f"set name it could not be loaded: {first}"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    splits: dict[str, Table] = {}
    for split, part in loaded.items():
        wanted = SPLIT_NAMES.get(str(split))
        if wanted is not None:
            splits[wanted] = _table(f"{source}[{split}]", enumerate(_named(part), start=1))
    if "train" not in splits:
        raise DataError(f"{source}: no training split; splits: {', '.join(map(str, loaded))}")
    return splits


def _named(part: object) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a `datasets.Dataset`.

    Class numbers are replaced by class names, in lists too; pictures stay encoded.
    """
    import datasets

    assert isinstance(part, datasets.Dataset)
    for column, feature in part.features.items():
        if isinstance(feature, datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))
    classes = {
        column: inner for column, feature in part.features.items()
        if isinstance(inner := getattr(feature, "feature", feature), datasets.ClassLabel)
    }
    for row in part:
        yield {key: _name(classes[key], value) if key in classes else value
               for key, value in dict(row).items()}


def _name(feature: Any, value: Any) -> Any:  # noqa: ANN401 - a number or a list of them
    if isinstance(value, list):
        return [_name(feature, each) for each in value]
    # -1 is the library's mark for a label that is withheld.
    return feature.int2str(value) if value is not None and value != -1 else None


def _table(source: str, numbered: Iterator[tuple[int, object]] | enumerate[object]) -> Table:
    rows: list[Mapping[str, Cell]] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    for number, row in numbered:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{source}:{number}: expected an object with named fields, found "
                f"{type(row).__name__}"
            )
        rows.append(row)
        lines.append(number)
        columns.update(dict.fromkeys(row))
    if not rows:
        raise DataError(f"{source}: no rows")
    return Table(source, tuple(columns), tuple(rows), tuple(lines))
