"""Finding a task's columns in data that publishers name, nest and number each in their way."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from hosl_flower.task_table import Task


def find_column(data: Dataset, wanted: str, task: Task) -> tuple[str, list[Any]] | None:
    """A column under the task's name for it, or else one of those in task.columns: (the name it
    has in the data, its values). None where it is missing; a value None where that is missing."""
    for names in ([wanted], *(other.split() for other in task.columns.get(wanted, ()))):
        known = [name for name in (_match(data.column_names, n) for n in names) if name is not None]
        if len(known) < len(names):
            continue
        if len(known) == 1:
            return known[0], _values(data, known[0], task)
        rows = zip(*(column(data, name) for name in known), strict=True)
        joined = [None if None in row else " ".join(map(str, row)) for row in rows]
        return " ".join(known), joined
    return None


def column(data: Dataset, name: str) -> list[Any]:
    """All values of a column. data[name] alone is lazy and reads row by row, 80 us each."""
    return data[name][:]


def _match(names: Sequence[str], wanted: str) -> str | None:
    """The column of that name; else the only one that is spelt differently ("Class Index") or
    nested ("target.span1_text")."""
    if wanted in names:
        return wanted
    for plain in (plain_name, lambda name: plain_name(name.rpartition(".")[2])):
        alike = [name for name in names if plain(name) == plain_name(wanted)]
        if len(alike) == 1:
            return alike[0]
    return None


def plain_name(name: str) -> str:
    """A column name in one spelling: "Class Index" -> "class_index"."""
    return re.sub(r"\W+", "_", name.strip().lower())


def _values(data: Dataset, name: str, task: Task) -> list[Any]:
    """The values of a column. Numbers that have names come as the names, where those are the
    task's labels: publishers number them differently."""
    values, feature = column(data, name), data.features[name]
    if isinstance(feature, ClassLabel) and feature.names:
        names = [str(label).lower() for label in feature.names]
        if all(label in task.label_names for label in names):
            return [names[value] if value in range(len(names)) else value for value in values]
    return values
