"""Examples as they were read: columns by the names a file has for them, rows with their places.

A column is converted when its values are asked for: an odd one that nobody uses does no harm.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import datasets
from datasets import ClassLabel, Dataset

from hosl_flower.errors import DataError, first_line

TWICE = object()  # a value of a row that gives it two
_SHOWN = 30  # names of columns in a message


class Table(ABC):
    """Examples of one source.

    where: the file, for messages. names: of the columns, in order; a file may repeat one. doubt:
    what else may be wrong where a column is missing.
    """

    doubt = ""

    def __init__(self, where: str, names: Sequence[str]):
        self.where, self.names = where, list(names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, name: str) -> list[Any]: ...

    def values(self, name: str) -> list[Any]:
        """All values of a column, None where one is missing. DataError when there are two columns
        of that name."""
        if (count := self.names.count(name)) > 1:
            many = "twice" if count == 2 else f"{count} times"
            raise DataError(
                f"{self.where}: column {name!r} is there {many}; rename or remove all but one"
            )
        values = self._read(name)
        for row, value in enumerate(values):
            if value is TWICE:
                raise DataError(f"{self.place(row)}: {name!r} is there twice; remove one")
        return values

    def classes(self, name: str) -> list[str] | None:
        """The names of a column's numbers, where the data have such."""
        return None

    def place(self, row: int) -> str:
        """Where a row is: file and row, counted from 1."""
        return f"{self.where}, row {row + 1}"

    def dataset(self) -> Dataset:
        """The table with its images. DataError for a kind of file that holds none."""
        raise DataError(
            f"{self.where} is a file of text and holds no images: use a folder of images for each "
            "class, idx files, npz arrays, parquet or Arrow"
        )

    @property
    def listed(self) -> str:
        """The names of the columns, for a message."""
        names = [name if name.isprintable() and name else repr(name) for name in self.names]
        more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
        return ", ".join(names[:_SHOWN]) + more if names else "no columns"


class Lines(Table):
    """Rows of a text file, each with the number of the line it begins on.

    noun: what is counted, where it is not lines.
    """

    def __init__(
        self, where: str, names: Sequence[str], rows: Sequence[Any], numbers: Sequence[Any],
        noun: str = "line",
    ):  # fmt: skip
        super().__init__(where, names)
        self._rows, self._numbers, self._noun = rows, numbers, noun

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row: int) -> str:
        return f"{self.where}, {self._noun} {self._numbers[row]}".replace("  ", " ")


class Records(Lines):
    """Rows with a field for each column.

    named: whether the first line of the file has the names of the columns.
    """

    def __init__(
        self, where: str, names: Sequence[str], rows: Sequence[Any], numbers: Sequence[int],
        named: bool = False,
    ):  # fmt: skip
        super().__init__(where, names, rows, numbers)
        if named:
            self.doubt = (
                "; the first line is read as the names of the columns: add one if it is none"
            )

    def _read(self, name: str) -> list[Any]:
        place = self.names.index(name)
        return [row[place] for row in self._rows]


class Objects(Lines):
    """Rows that are objects, whose nested ones give columns such as "target.span1_text"; a row
    without a column has None there."""

    def __init__(
        self, where: str, rows: Sequence[Mapping[str, Any]], numbers: Sequence[Any],
        noun: str = "line",
    ):  # fmt: skip
        flat = [dict(_flat(row)) for row in rows]
        super().__init__(
            where, list(dict.fromkeys(k for r in flat for k in r)), flat, numbers, noun
        )

    def _read(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        inner = _flat(value) if isinstance(value, dict) and value else [("", value)]
        for rest, leaf in inner:
            name = f"{key}.{rest}" if rest else key
            found[name] = TWICE if name in found else leaf
    yield from found.items()


class Arrow(Table):
    """Columns that know their types: parquet, Arrow, saved data sets, the hub's.

    columns: their names, nested ones flattened, and what reads each. whole: reads all.
    """

    def __init__(
        self, where: str, size: int, columns: Sequence[tuple[str, Callable[[], Dataset]]],
        whole: Callable[[], Dataset],
    ):  # fmt: skip
        super().__init__(where, [name for name, _ in columns])
        self._size, self._readers, self._whole = size, dict(columns), whole

    @classmethod
    def of(cls, data: Dataset, where: str) -> "Arrow":
        """A data set of the datasets library."""
        flat = data.flatten()
        columns = [(name, lambda: flat) for name in flat.column_names]
        return cls(where, len(data), columns, lambda: flat)

    def __len__(self) -> int:
        return self._size

    def _column(self, name: str) -> Dataset:
        try:
            return self._readers[name]()
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise DataError(
                f"{self.where}: column {name!r} cannot be read: {first_line(error)}"
            ) from error

    def _read(self, name: str) -> list[Any]:
        # data[name] alone is lazy and reads row by row, 80 us each
        return list(self._column(name)[name][:])

    def classes(self, name: str) -> list[str] | None:
        feature = self._column(name).features[name]
        named = isinstance(feature, ClassLabel) and feature.names
        return [str(label) for label in feature.names] if named else None

    def dataset(self) -> Dataset:
        try:
            return self._whole()
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise DataError(f"{self.where} cannot be read: {first_line(error)}") from error


class Joined(Table):
    """The files of one part, one after another."""

    def __init__(self, where: str, tables: Sequence[Table]):
        first, *others = tables
        more = dict.fromkeys(name for table in others for name in table.names)
        super().__init__(where, [*first.names, *(n for n in more if n not in first.names)])
        self._tables = tables
        self._starts = [0, *accumulate(map(len, tables))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _read(self, name: str) -> list[Any]:
        found: list[Any] = []
        for table in self._tables:
            found += table.values(name) if name in table.names else [None] * len(table)
        return found

    def classes(self, name: str) -> list[str] | None:
        found = [table.classes(name) for table in self._tables if name in table.names]
        if any(own != found[0] for own in found):
            raise DataError(
                f"{self.where}: the files do not name the labels of column {name!r} alike"
            )
        return found[0]

    def place(self, row: int) -> str:
        number = bisect_right(self._starts, row) - 1
        return self._tables[number].place(row - self._starts[number])

    def dataset(self) -> Dataset:
        return datasets.concatenate_datasets([table.dataset() for table in self._tables])


class Chosen(Table):
    """Some columns of a table."""

    def __init__(self, table: Table, names: Sequence[str]):
        super().__init__(table.where, names)
        self._table, self.doubt = table, table.doubt

    def __len__(self) -> int:
        return len(self._table)

    def _read(self, name: str) -> list[Any]:
        return self._table.values(name)

    def classes(self, name: str) -> list[str] | None:
        return self._table.classes(name)

    def place(self, row: int) -> str:
        return self._table.place(row)

    def dataset(self) -> Dataset:
        return self._table.dataset().select_columns(self.names)
