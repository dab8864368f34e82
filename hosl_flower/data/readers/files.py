"""Reading one local file of examples, whatever it is: columns with names come out.

Published data sets come as tsv (GLUE), jsonl with nested objects (SuperGLUE), csv or tsv without
a header line (AG News, the SMS collection), "LABEL:finer text" lines (TREC), articles of paragraphs
of questions (SQuAD) or parquet (the hub).
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset

from hosl_flower.data.readers.delimited import read_delimited
from hosl_flower.data.readers.json_rows import read_json
from hosl_flower.data.tables import Arrow, Records, Table
from hosl_flower.errors import DataError, first_line
from hosl_flower.tasks.labels import label_key
from hosl_flower.tasks.task import Task

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow", ".txt", ".label")
_BINARY = (".parquet", ".arrow")
_LABELLED_LINE = re.compile(r"(\w+):(\S+)\s+(\S.*)")  # DESC:manner How did serfdom develop ?
_BEGINNINGS = {
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive, as the workbooks of spreadsheets are",
    b"version https://git-lfs": "a pointer of Git LFS, not the file (run git lfs pull)",
}  # fmt: skip


def is_table(path: Path) -> bool:
    """Whether a file is of a kind that is read here, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_file(path: Path, task: Task) -> Table:
    """The examples of a file, nested objects as columns "target.span1_text".

    task: says how files without a header line are to be read. Raises DataError with the place.
    """
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[], Table]] = {
        ".csv": lambda: read_delimited(path, ",", task),
        ".tsv": lambda: read_delimited(path, "\t", task),
        ".txt": lambda: _text(path, task),
        ".label": lambda: _text(path, task),
        "": lambda: _text(path, task),  # SMSSpamCollection
        ".jsonl": lambda: read_json(path),
        ".json": lambda: read_json(path),
        ".parquet": lambda: _parquet(path),
        ".arrow": lambda: Arrow.of(Dataset.from_file(str(path)), str(path)),
    }
    if suffix not in readers:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        _check_bytes(path, is_text=suffix not in _BINARY)
        return readers[suffix]()
    except DataError:
        raise
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(
            f"{path}, line {_first_line_not_utf8(path)} is not in UTF-8 ({byte}); save it as UTF-8"
        ) from error
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        kind, reason = suffix[1:] or "text", first_line(error)
        raise DataError(f"{path} cannot be read as {kind}: {reason}") from error


def _check_bytes(path: Path, is_text: bool) -> None:
    """DataError where the bytes are of another kind than the name says."""
    with path.open("rb") as file:
        head = file.read(32)
        for begin, what in _BEGINNINGS.items():
            if head.startswith(begin) and (is_text or what.startswith("a pointer")):
                raise DataError(f"{path} is {what}; expected {_expected(path, is_text)}")
        if not is_text:
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if b"\0" in line:
                raise DataError(
                    f"{path}, line {number} has a byte 0, which no text has: the file is damaged, "
                    "or UTF-16; save it as UTF-8"
                )


def _expected(path: Path, is_text: bool) -> str:
    return "text in UTF-8" if is_text else f"a file of {path.suffix[1:]}"


def _first_line_not_utf8(path: Path) -> int:
    number = 0
    with path.open("rb") as file:
        for line in file:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


def _text(path: Path, task: Task) -> Table:
    """A table with tabs, or lines "LABEL:finer text" where LABEL is one of the task's."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    first = _LABELLED_LINE.match(data.partition(b"\n")[0].decode("utf-8", "replace"))
    if first is None or label_key(first[1]) not in map(label_key, task.label_names):
        return read_delimited(path, "\t", task)
    try:
        text = data.decode()
    except UnicodeDecodeError:  # TREC has one byte 0xF0 where a space belongs
        text = data.replace(b"\xf0", b" ").decode("latin-1")
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = _LABELLED_LINE.match(line)
        if found is None:
            raise DataError(
                f"{path}, line {number}: expected LABEL:finer and a text, got {line[:40]!r}"
            )
        label, finer, rest = found.groups()
        rows.append([label, f"{label}:{finer}", rest.strip()])
        numbers.append(number)
    return Records(str(path), [task.label_column, "fine_label", "text"], rows, numbers)


def _parquet(path: Path) -> Table:
    """Columns are read one by one, when they are used: others may be of types unknown here."""
    file = pyarrow.parquet.ParquetFile(path)
    schema = file.schema_arrow

    @cache
    def outer(place: int) -> Dataset:
        table = file.read(columns=[schema.names[place]])
        return Dataset(table.replace_schema_metadata(schema.metadata)).flatten()

    columns = [
        (name, partial(outer, place))
        for place, field in enumerate(schema)
        for name in _nested(field.name, field.type)
    ]
    whole = lambda: Dataset(file.read()).flatten()  # noqa: E731
    return Arrow(str(path), file.metadata.num_rows, columns, whole)


def _nested(name: str, kind: pyarrow.DataType) -> Iterator[str]:
    """The names that a column gives when it is flattened."""
    if not pyarrow.types.is_struct(kind):
        yield name
        return
    for field in kind:
        yield from _nested(f"{name}.{field.name}", field.type)
