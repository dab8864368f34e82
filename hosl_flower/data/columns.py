"""Finding a task's columns in data that publishers name, nest and number each in their way."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from hosl_flower.data.tables import Table
from hosl_flower.errors import DataError
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.known_images import IMAGE_TASKS
from hosl_flower.tasks.labels import is_missing, label_key, listed, same_labels
from hosl_flower.tasks.task import Task


def find_column(data: Table, wanted: str, task: Task) -> tuple[str, list[Any]] | None:
    """A column under the task's name for it, or else one of those in task.columns: (the name it
    has in the data, its values). None where it is missing; a value None where that is missing.
    DataError when the column is there twice, or the names its numbers have are not the task's."""
    for names in ([wanted], *(other.split() for other in task.columns.get(wanted, ()))):
        known = [found[0] for n in names if len(found := matching(data.names, n)) == 1]
        if len(known) < len(names):
            continue
        if len(known) == 1:
            return known[0], _values(data, known[0], task)
        rows = zip(*(map(_or_none, data.values(name)) for name in known), strict=True)
        joined = [None if None in row else " ".join(map(str, row)) for row in rows]
        return " ".join(known), joined
    return None


def _or_none(value: Any) -> Any:
    return None if is_missing(value) else value


def matching(names: Sequence[str], wanted: str) -> list[str]:
    """The column of that name; else those that are spelt differently ("Class Index") or nested
    ("target.span1_text"): one, or it is not clear which is meant."""
    if wanted in names:
        return [wanted]
    alike: list[str] = []
    for plain in (plain_name, lambda name: plain_name(name.rpartition(".")[2])):
        # a name repeated is found once, and refused when it is read
        alike = list(dict.fromkeys(name for name in names if plain(name) == plain_name(wanted)))
        if alike and plain_name(wanted).strip("_"):
            return alike
    return []


def plain_name(name: str) -> str:
    """A column name in one spelling: "Class Index" -> "class_index"."""
    return re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name).strip().casefold())


def suggestion(names: Sequence[str], wanted: str) -> str:
    """The columns that a missing one may be, for a message; "" where none is like it."""
    alike = matching(names, wanted)
    if not alike:
        plain = {plain_name(name): name for name in names}
        near = difflib.get_close_matches(plain_name(wanted), plain, n=2, cutoff=0.7)
        alike = [plain[name] for name in near]
    return f"; did you mean {' or '.join(map(repr, alike))}?" if alike else ""


def _values(data: Table, name: str, task: Task) -> list[Any]:
    """The values of a column. Numbers that have names come as the names, where those are the
    task's labels: publishers number them differently."""
    values, names = data.values(name), data.classes(name)
    if names is None:
        return values
    if _are_labels(names, task, f"{data.where}, column {name!r}"):
        return [names[value] if value in range(len(names)) else value for value in values]
    return values


def _are_labels(names: Sequence[str], task: Task, where: str) -> bool:
    """Whether these names of a column's numbers stand for the labels; if not, the numbers do.
    Where somebody has named labels and the data names others, numbers would be a guess."""
    if all(name.isdigit() for name in names):  # folders "0", "1", "10", "2", in that order
        return True
    if task.label_names and (same := same_labels(names)):
        raise DataError(
            f"{where}: its labels {same[0]!r} and {same[1]!r} are one label by name; rename one"
        )
    known = {**TASKS, **IMAGE_TASKS}.get(task.name)
    is_given = known is None or known.label_names != task.label_names
    own = set(map(label_key, task.label_names))
    strangers = [name for name in names if label_key(name) not in own]
    if strangers and task.label_names and (is_given or len(strangers) < len(names)):
        raise DataError(
            f"{where}: its labels are {listed(names)}, and the task's "
            f"{listed(task.label_names)}; say what each means in verbalizers, as in "
            f"{','.join(f'{name}=<answer>' for name in names[:2])}"
            f"{',...' if len(names) > 2 else ''}"
        )
    return not strangers
