"""Tables as text: csv, tsv, what spreadsheets, pandas and R write, and files without a header line.

GLUE and the SMS collection separate with tabs and quote nothing: a " is part of the text. pandas,
R and spreadsheets quote. The quotes of a file tell which of them wrote it. The separator is that of
the file's name, or, where the header line does not have it, one that the header line has.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hosl_flower.data.columns import matching
from hosl_flower.data.tables import Records
from hosl_flower.errors import DataError
from hosl_flower.tasks.labels import MOST_LABELS, label_key, parse_label
from hosl_flower.tasks.task import Task

Rows = list[list[str]]

_SEPARATORS = ",\t;|"
_LONGEST = 2**31 - 1  # characters of a field; csv's own limit is 131,072
# a field with or without quotes, and what ends it
_FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^\t\r\n"]*))(\t|\r\n?|\n|\Z)')
_MUST_BE_QUOTED = re.compile(r'""|[\t\r\n]')


def read_delimited(path: Path, separator: str, task: Task) -> Records:
    """A table with a header line, or without one where the labels are evident.

    separator: of the file's kind. task: names the columns. Raises DataError with the line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    header = next((line for line in re.split(r"[\r\n]+", text) if line.strip()), "")
    if not header:
        raise DataError(f"{path} is empty; expected a header line with the names of the columns")
    if separator not in header:
        separator = next((other for other in _SEPARATORS if other in header), separator)
    rows, numbers = _parsed(path, text, separator)
    names = None if _is_header(rows[0], task) else _names_without_header(rows, task)
    named = names is None
    if names is None:  # where a column is missing, that is said when it is used
        names, *rows = _without_row_names(rows)
        numbers = numbers[1:]
    _check_widths(path, names, rows, numbers, separator)
    return Records(str(path), names, rows, numbers, named)


def _parsed(path: Path, text: str, separator: str) -> tuple[Rows, list[int]]:
    """The fields of each row that is not empty, and the line it begins on."""
    if '"' not in text:
        return _rows(path, text, separator, csv.QUOTE_NONE)
    if separator == "\t":
        plain = _rows(path, text, separator, csv.QUOTE_NONE)
        if not _is_quoted(text, len(set(map(len, plain[0]))) == 1):
            return plain
    try:
        return _rows(path, text, separator, csv.QUOTE_MINIMAL)
    except DataError:
        if '\\"' not in text:
            raise
        try:  # R and Spark write \" where others write ""
            escaped = text.replace('\\"', '""')
            return _rows(path, escaped, separator, csv.QUOTE_MINIMAL)
        except DataError:
            pass
        raise


def _rows(path: Path, text: str, separator: str, quoting: Literal[0, 3]) -> tuple[Rows, list[int]]:
    rows, numbers, begin = [], [], 1
    with _long_fields():
        reader = csv.reader(_lines(text), delimiter=separator, quoting=quoting, strict=True)
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    numbers.append(begin)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {begin}: {error}; a text with {separator!r}, a quote or a newline "
                'is written in quotes, and a quote in it as ""'
            ) from error
    return rows, numbers


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends, which are those of every system, and no other characters."""
    return (found[0] for found in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))


def _is_quoted(text: str, plain_fits: bool) -> bool:
    """Whether the writer of a table with tabs quoted: where all of the first line is in quotes, or
    else where all quotes are around fields that need them.

    plain_fits: whether all rows are of one length when quotes are text.
    """
    first = re.split(r"[\r\n]+", text.lstrip("\r\n"), maxsplit=1)[0].split("\t")
    if all(len(field) > 1 and field[0] == field[-1] == '"' for field in first):
        return True
    quoted, commas, place = [], False, 0
    while place < len(text):
        field = _FIELD.match(text, place)
        if field is None:
            return False
        if field[1] is not None:
            quoted.append(field[1])
        else:
            commas = commas or "," in field[2]
        place = field.end()
    # spreadsheets quote commas too
    if not all(_MUST_BE_QUOTED.search(own) or ("," in own and not commas) for own in quoted):
        return False
    return not plain_fits or any('""' in own for own in quoted)


def _wanted(task: Task) -> list[str]:
    return [*task.fields, task.answer_column, *task.columns]


def _is_header(first: Sequence[str], task: Task) -> bool:
    """Whether a first line names a column that the task can use."""
    if _is_example_of(first, task):
        return False
    others = [name for names in task.columns.values() for some in names for name in some.split()]
    return any(matching(first, name) for name in (*_wanted(task), *others))


def _is_example_of(first: Sequence[str], task: Task) -> bool:
    """Whether a row is an example of a task whose columns are known by their order: it has a label
    where one belongs."""
    if len(first) != len(task.header):
        return False
    for name, value in zip(task.header, first, strict=True):
        if name == task.label_column or name in task.from_one:
            return _is_label(value, task, int(name in task.from_one))
    return False


def _is_label(value: str, task: Task, first: int = 0) -> bool:
    try:
        parse_label(value, task, "", first)
    except DataError:
        return False
    return True


def _names_without_header(rows: Rows, task: Task) -> list[str] | None:
    """The columns of a file without a header line: those of the task in their order, or a text and
    a label, in either order, where one of the columns is evidently the labels."""
    if _is_example_of(rows[0], task):
        return list(task.header)
    if len(task.fields) != 1 or task.target or any(len(row) != 2 for row in rows):
        return None
    is_labels: Callable[[list[str]], bool] = _repeats
    if task.verbalizers:
        is_labels = lambda values: all(_is_label(value, task) for value in values)  # noqa: E731
    found = [is_labels([row[place] for row in rows]) for place in (0, 1)]
    if found == [True, False]:
        return [task.label_column, task.fields[0]]
    if found == [False, True]:
        return [task.fields[0], task.label_column]
    return None


def _repeats(values: list[str]) -> bool:
    """Whether a column is labels and has no name: its first value comes again, which a name does
    not, and there are few."""
    counts = Counter(map(label_key, values))
    few = 1 < len(counts) <= min(MOST_LABELS, (len(values) + 1) // 2)
    return few and counts[label_key(values[0])] > 1


def _without_row_names(rows: Rows) -> Rows:
    """Rows as R writes them begin with a number that has no name in the header."""
    header, *examples = rows
    numbers = [row[0] for row in examples if len(row) == len(header) + 1 and row[0].isdecimal()]
    if not examples or len(set(numbers)) < len(examples):
        return rows
    return [header, *(row[1:] for row in examples)]


def _check_widths(
    path: Path, names: Sequence[str], rows: Rows, numbers: Sequence[int], separator: str
) -> None:
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {number} has {len(row)} fields, the header {len(names)}: a text "
                f"with {separator!r} in it belongs in quotes, and every column has a name"
            )
