"""Reading one local file of examples, whatever it is: columns with names come out.

Published data sets come as tsv (GLUE), jsonl with nested objects (SuperGLUE), csv or tsv without
a header line (AG News, the SMS collection), "LABEL:finer text" lines (TREC), articles of paragraphs
of questions (SQuAD) or parquet (the hub).
"""

import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet
from datasets import Dataset

from hosl_flower.errors import DataError, first_line
from hosl_flower.squad import is_squad, squad_rows
from hosl_flower.task_table import Task
from hosl_flower.tasks import parse_label

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow", ".txt", ".label")
SEMICOLONS = "; is the separator a semicolon? Write the file with commas"
_LABELLED_LINE = re.compile(r"(\w+):(\S+)\s+(\S.*)")  # DESC:manner How did serfdom develop ?


def read_file(path: Path, task: Task) -> Dataset:
    """The examples of a file, nested objects as columns "target.span1_text".

    task: says how files without a header line are to be read. Raises DataError with the place.
    """
    readers: dict[str, Callable[[], Dataset]] = {
        ".csv": lambda: _table(path, ",", csv.QUOTE_MINIMAL, task),
        # GLUE and the SMS collection do not quote: a lone " is part of the text
        ".tsv": lambda: _table(path, "\t", csv.QUOTE_NONE, task),
        ".txt": lambda: _text(path, task),
        ".label": lambda: _text(path, task),
        "": lambda: _text(path, task),  # SMSSpamCollection
        ".jsonl": lambda: _json_lines(path),
        ".json": lambda: _json_lines(path),
        ".parquet": lambda: Dataset(pyarrow.parquet.read_table(path)),
        ".arrow": lambda: Dataset.from_file(str(path)),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        return readers[path.suffix]().flatten()
    except DataError:
        raise
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path} is not in UTF-8 ({byte}); save it as UTF-8") from error
    except Exception as error:  # csv and pyarrow raise many kinds for a damaged file
        kind, reason = path.suffix[1:] or "text", first_line(error)
        raise DataError(f"{path} cannot be read as {kind}: {reason}") from error


def _table(path: Path, delimiter: str, quoting: Literal[0, 3], task: Task) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        header = next(reader, None)
        if not header:
            raise ValueError("it is empty, expected a header line with the column names")
        first = []
        if _is_example(header, task):
            first, header = [header], list(task.header)
        columns: list[list[str]] = [[] for _ in header]
        for row in itertools.chain(first, reader):
            if not row:
                continue
            if len(row) != len(header):
                semicolons = len(header) == 1 and ";" in header[0]
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} fields, the header {len(header)}"
                    f"{SEMICOLONS if semicolons else ''}"
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return Dataset.from_dict(dict(zip(header, columns, strict=True)))


def _is_example(first: list[str], task: Task) -> bool:
    """Whether the first line of a table is an example: it has a label where one belongs."""
    if len(first) != len(task.header):
        return False
    for name, value in zip(task.header, first, strict=True):
        if name == task.label_column or name in task.from_one:
            try:
                parse_label(value, task, "", first=int(name in task.from_one))
            except DataError:
                return False
            return True
    return False


def _text(path: Path, task: Task) -> Dataset:
    """A table with tabs, or lines "LABEL:finer text" where LABEL is one of the task's."""
    with path.open("rb") as file:
        first = _LABELLED_LINE.match(file.readline().decode("utf-8", "replace"))
    if first is None or first[1].lower() not in task.label_names:
        return _table(path, "\t", csv.QUOTE_NONE, task)
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:  # TREC has one byte 0xF0 where a space belongs
        text = data.replace(b"\xf0", b" ").decode("latin-1")
    columns: dict[str, list[str]] = {task.label_column: [], "fine_label": [], "text": []}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = _LABELLED_LINE.match(line)
        if found is None:
            raise DataError(
                f"{path}, line {number}: expected LABEL:finer and a text, got {line[:40]!r}"
            )
        label, finer, rest = found.groups()
        values = (label, f"{label}:{finer}", rest.strip())
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return Dataset.from_dict(columns)


def _json_lines(path: Path) -> Dataset:
    text, rows = path.read_text(encoding="utf-8-sig"), []
    content = _whole(text) if path.suffix == ".json" and text.lstrip().startswith("{") else None
    found: list[tuple[str, Any]]
    if is_squad(content):
        found = [("", row) for row in squad_rows(content, str(path))]
    elif path.suffix == ".json" and text.lstrip().startswith("["):  # one list of objects
        found = [(f"element {n}", row) for n, row in enumerate(json.loads(text), start=1)]
    else:
        found = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), start=1)]
    for place, row in found:
        if isinstance(row, str):
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except ValueError as error:
                raise DataError(f"{path}, {place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: expected an object, got {json.dumps(row)[:40]!r}")
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)  # rows may lack some
    return Dataset.from_dict({key: _one_type([row.get(key) for row in rows]) for key in columns})


def _whole(text: str) -> Any:
    """A JSON file as one value; None where it is lines, each a value of its own."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _one_type(values: list[Any]) -> list[Any]:
    """A column has one type: where a file mixes words and numbers, they are all words."""
    types = {type(value) for value in values if value is not None}
    if len(types) < 2 or types <= {int, float} or types & {dict, list}:
        return values
    return [None if value is None else str(value) for value in values]
