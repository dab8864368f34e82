"""Examples and where they come from: the hub, the package, or a local file.

A source has a training part, which partition.py spreads over the clients, and a held-out part.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet
from datasets import Dataset

from hosl_flower import hub
from hosl_flower.errors import DataError, first_line
from hosl_flower.perturb import derive_seed, permutation
from hosl_flower.tasks import BUNDLED, Task, parse_label

HELD_OUT_FRACTION = 0.2  # of a source that comes without a held-out part
_HELD_OUT_NAMES = ("validation", "val", "dev", "test")
_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow", ".txt")


def load_source(
    source: str, task: Task, seed: int, partition_column: str = ""
) -> tuple[Dataset, Dataset]:
    """(training, held-out) examples: the columns of the prompt, an integer "label" and, for the
    training part, the partition column as text, if one is given.

    source: "hub:<repository>/<configuration>", "bundled:<folder>", or a local path. Without a
    held-out part of its own, a fifth of the source, drawn with `seed`, is held out. A partition
    column that is the label column too is the integer "label".
    """
    if source.startswith("hub:"):
        train, held_out = _from_hub(source.removeprefix("hub:"))
    else:
        bundled = source.startswith("bundled:")
        path = BUNDLED / source.removeprefix("bundled:") if bundled else Path(source).expanduser()
        train, held_out = _from_path(path)
    train = _normalise(train, task, f"{source} (train)", partition_column)
    if held_out is not None:
        return train, _normalise(held_out, task, f"{source} (held-out)")
    order = permutation(len(train), derive_seed(seed, "held-out"))
    cut = max(1, round(len(train) * HELD_OUT_FRACTION))
    if cut >= len(train):
        raise DataError(f"{source} has {len(train)} example(s): too few to hold some out")
    return train.select(order[cut:]), train.select(order[:cut])


def _from_hub(name: str) -> tuple[Dataset, Dataset | None]:
    repository, _, configuration = name.rpartition("/")
    if not repository or not configuration:
        raise DataError(f"hub data set {name!r}: expected hub:<repository>/<configuration>")
    if not hub.is_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # go straight to the cache, without retries
    try:
        loaded = datasets.load_dataset(repository, configuration)
    except Exception as error:  # datasets raises many kinds for one cause: it cannot be had
        raise DataError(
            f"data set {name!r} cannot be had from the hub or its cache "
            f"({first_line(error)}); set data-path to a local copy"
        ) from error
    return _parts(loaded, name)


def _parts(loaded: Any, name: str) -> tuple[Dataset, Dataset | None]:
    """Training and held-out part of a DatasetDict."""
    if "train" not in loaded:
        raise DataError(f"{name} has no 'train' part; it has {', '.join(loaded)}")
    held_out = next((loaded[part] for part in _HELD_OUT_NAMES if part in loaded), None)
    return loaded["train"], held_out


def _from_path(path: Path) -> tuple[Dataset, Dataset | None]:
    if path.is_file():
        return _read_file(path), None
    if not path.is_dir():
        raise DataError(f"data path {str(path)!r} does not exist")
    if (path / "dataset_dict.json").is_file():
        return _parts(_saved_dataset(path), str(path))
    if (path / "dataset_info.json").is_file():
        return _saved_dataset(path), None
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES}
    if "train" not in files:
        raise DataError(
            f"{path} has no train file; expected train and, optionally, validation, val, dev or "
            f"test, each one of {', '.join(_SUFFIXES)}"
        )
    held_out = next((files[name] for name in _HELD_OUT_NAMES if name in files), None)
    return _read_file(files["train"]), _read_file(held_out) if held_out else None


def _saved_dataset(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged directory
        raise DataError(f"{path} is a damaged saved data set: {first_line(error)}") from error


def _read_file(path: Path) -> Dataset:
    readers: dict[str, Callable[[Path], Dataset]] = {
        ".csv": lambda p: _table(p, ",", csv.QUOTE_MINIMAL),
        # GLUE and the SMS collection do not quote: a lone " is part of the text
        ".tsv": lambda p: _table(p, "\t", csv.QUOTE_NONE),
        ".txt": lambda p: _table(p, "\t", csv.QUOTE_NONE),
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".parquet": lambda p: Dataset(pyarrow.parquet.read_table(p)),
        ".arrow": lambda p: Dataset.from_file(str(p)),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except DataError:
        raise
    except Exception as error:  # csv and pyarrow raise many kinds for a damaged file
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error


def _table(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        header = next(rows, None)
        if not header:
            raise ValueError("it is empty, expected a header line with the column names")
        columns: list[list[str]] = [[] for _ in header]
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} fields, the header {len(header)}"
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return Dataset.from_dict(dict(zip(header, columns, strict=True)))


def _json_lines(path: Path) -> Dataset:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)  # rows may lack some
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})


def _normalise(data: Dataset, task: Task, where: str, partition_column: str = "") -> Dataset:
    """Keep the prompt's columns, parse the label; DataError names what is missing."""
    if partition_column and partition_column not in data.column_names:
        raise DataError(
            f"{where} has no column {partition_column!r} (partition-column); the data has "
            f"{', '.join(data.column_names)}"
        )
    missing = [name for name in (*task.fields, task.label_column) if name not in data.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}; task {task.name} needs "
            f"{', '.join((*task.fields, task.label_column))}, the data has "
            f"{', '.join(data.column_names)} (set prompt and label-column)"
        )
    _check_label_name(task, where, partition_column)
    if len(data) == 0:
        raise DataError(f"{where} has no examples")
    labels = [
        parse_label(value, task, f"{where}, row {row}")
        for row, value in enumerate(data[task.label_column], start=1)
    ]
    columns = {name: [str(text) for text in data[name]] for name in task.fields}
    for name in task.fields:
        empty = next((row for row, text in enumerate(data[name], start=1) if text is None), None)
        if empty is not None:
            raise DataError(f"{where}, row {empty}: {name} is missing")
    ids = _ids(data, partition_column, where) if partition_column else {}
    return Dataset.from_dict({**ids, **columns, "label": labels})


def _check_label_name(task: Task, where: str, partition_column: str) -> None:
    """Parsed labels are kept as column "label": no other column of that name can be kept too."""
    taken = partition_column == "label" and task.label_column != "label"
    if taken or "label" in task.fields:
        use = "partition-column" if taken else "prompt"
        raise DataError(
            f"{where}: column 'label' cannot be used by {use}, the labels of "
            f"{task.label_column!r} are kept under that name; rename it in the data"
        )


def _ids(data: Dataset, column: str, where: str) -> dict[str, list[str]]:
    """The partition column as text. A row that is nobody's would make one more client."""
    ids = ["" if value is None else str(value) for value in data[column]]
    if "" in ids:
        raise DataError(
            f"{where}, row {ids.index('') + 1}: {column} (partition-column) is missing; say "
            "whose example it is, or remove the row"
        )
    return {column: ids}


def take(data: Dataset, limit: int, seed: int) -> Dataset:
    """At most `limit` examples (0 is all), drawn with `seed`."""
    if not 0 < limit < len(data):
        return data
    return data.select(permutation(len(data), seed)[:limit])
