"""Finding a task's columns in data that publishers name, nest and number each in their way."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from hosl_flower.errors import DataError
from hosl_flower.image_tasks import IMAGE_TASKS
from hosl_flower.task_table import TASKS, Task


def find_column(data: Dataset, wanted: str, task: Task, where: str) -> tuple[str, list[Any]] | None:
    """A column under the task's name for it, or else one of those in task.columns: (the name it
    has in the data, its values). None where it is missing; a value None where that is missing.
    DataError, which says `where`, when the names its numbers have are not the task's."""
    for names in ([wanted], *(other.split() for other in task.columns.get(wanted, ()))):
        known = [name for name in (_match(data.column_names, n) for n in names) if name is not None]
        if len(known) < len(names):
            continue
        if len(known) == 1:
            return known[0], _values(data, known[0], task, where)
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


def _values(data: Dataset, name: str, task: Task, where: str) -> list[Any]:
    """The values of a column. Numbers that have names come as the names, where those are the
    task's labels: publishers number them differently."""
    values, feature = column(data, name), data.features[name]
    if not isinstance(feature, ClassLabel) or not feature.names:
        return values
    names = [str(label).lower() for label in feature.names]
    if _are_labels(names, task, f"{where}, column {name!r}"):
        return [names[value] if value in range(len(names)) else value for value in values]
    return values


def _are_labels(names: Sequence[str], task: Task, where: str) -> bool:
    """Whether these names of a column's numbers stand for the labels; if not, the numbers do.
    Where somebody has named labels and the data names others, numbers would be a guess."""
    if all(name.isdigit() for name in names):  # folders "0", "1", "10", "2", in that order
        return True
    known = {**TASKS, **IMAGE_TASKS}.get(task.name)
    is_given = known is None or known.label_names != task.label_names
    strangers = [name for name in names if name not in task.label_names]
    if strangers and task.label_names and (is_given or len(strangers) < len(names)):
        raise DataError(
            f"{where}: its labels are {', '.join(names)}, and the task's "
            f"{', '.join(task.label_names)}; say what each means in verbalizers, as in "
            f"{','.join(f'{name}=<answer>' for name in names[:2])}"
            f"{',...' if len(names) > 2 else ''}"
        )
    return not strangers
