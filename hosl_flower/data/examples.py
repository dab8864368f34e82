"""From a table as it was read to examples: the prompt's columns as text, labels as numbers."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from hosl_flower.data.columns import find_column, plain_name, suggestion
from hosl_flower.data.readers.images import image_columns
from hosl_flower.data.readers.squad import right_answers
from hosl_flower.data.tables import Table
from hosl_flower.errors import DataError
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.labels import is_missing, parse_label
from hosl_flower.tasks.prompt_template import braces_as_text
from hosl_flower.tasks.task import Task

log = logging.getLogger("hosl_flower")

_HALF = "\ufffd"  # in place of half a character


def normalised(
    data: Table, task: Task, partition_column: str = "", labelled: bool = True, advice: str = ""
) -> Dataset:
    """Return the prompt's columns of a table, and the column "label" or "answers".

    Args:
        data: the table as it was read.
        task: the task, which names the columns.
        partition_column: a column of client IDs to keep.
        labelled: whether the column with labels or answers is needed.
        advice: the end of the message about a missing column, instead of the keys to set.

    Raises:
        DataError: for a missing column or value, with its place.
    """
    if partition_column and partition_column not in data.names:
        raise DataError(
            f"{data.where} has no column {partition_column!r} (partition-column); the data has "
            f"{data.listed}{suggestion(data.names, partition_column)}"
        )
    wanted = [*task.fields, *[task.answer_column] * labelled]
    columns = _columns(data, task, wanted, advice)
    _check_kept_name(task, data.where, partition_column)
    if len(data) == 0:
        raise DataError(f"{data.where} has no examples")
    right = _right(*columns[task.answer_column], task, data) if labelled else {}
    texts = {name: _texts(*columns[name], data) for name in task.fields}
    _say_what_is_empty(texts, data)
    ids = _ids(data, partition_column) if partition_column else {}
    if task.image:
        images = image_columns(data.dataset(), task, data.where)
        for name, values in {**ids, **right}.items():
            images = images.add_column(name, values)
        return images
    return Dataset.from_dict({**ids, **texts, **right})


def is_without_labels(labels: Sequence[Any]) -> bool:
    """Whether none of them is a label: what benchmarks publish of a test part."""
    return all(is_missing(v) or v == [] or str(v).strip() in ("", "-1", "-1.0") for v in labels)


def _columns(
    data: Table, task: Task, wanted: Sequence[str], advice: str
) -> dict[str, tuple[str, list[Any]]]:
    """The columns that are wanted: of each, the name it has in the data and its values."""
    if not data.names:
        raise DataError(f"{data.where} has no examples")
    found = {name: find_column(data, name, task) for name in wanted}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        keys = "" if task.image else "prompt and "
        keys = f" (set {keys}{'target' if task.target else 'label'}-column)"
        way_out = _way_out(data, task, [name for name in missing if name in task.fields])
        raise DataError(
            f"{data.where} has no column {', '.join(map(repr, missing))}; task {task.name} needs "
            f"{', '.join(found)}, the data has {data.listed}"
            f"{''.join(suggestion(data.names, name) for name in missing[:2])}"
            f"{advice + data.doubt if advice else keys + way_out}"
        )
    for name in braces_as_text(task.prompt):
        if name in data.names:
            log.warning(
                "prompt: {%s} is text in it, though %s has a column of that name; a column stands "
                "in single braces, and its name has a letter or digit and no double quote",
                name,
                data.where,
            )
    return {name: column for name, column in found.items() if column is not None}


def _way_out(data: Table, task: Task, fields: Sequence[str]) -> str:
    """What else may be wrong where columns are missing."""
    out = ""
    if task.name in TASKS:
        out = (
            "; for data of your own, set task to a new name, with prompt, verbalizers and "
            "label-column"
        )
    elif any(not re.fullmatch(r"\w+", name) for name in fields) or 0 < len(fields) < len(
        task.fields
    ):
        out = "; braces that are text, and no column, are written twice, {{ and }}"
    if any(separator in name for name in data.names for separator in ";\t|"):
        return f"{out}; is the separator another?"
    return out + data.doubt


def _texts(column: str, values: Sequence[Any], data: Table) -> list[str]:
    """A column as text. DataError for the first row that has none."""
    texts = []
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(
                f"{data.place(row)}: {column} is missing; write an empty text, or remove the row"
            )
        if isinstance(value, list | dict | bytes):
            raise DataError(
                f"{data.place(row)}: {column} is a {type(value).__name__}, expected text; choose "
                "another column in prompt"
            )
        texts.append(str(value))
    return _whole_characters(texts, [*range(len(texts))], column, data)


def _whole_characters(texts: list[str], rows: Sequence[int], column: str, data: Table) -> list[str]:
    """Texts of which JSON gave half a character, as of an emoji that was cut, without it."""
    halves = [i for i, text in enumerate(texts) if not text.isascii() and _is_cut(text)]
    if not halves:
        return texts
    log.warning(
        "%s: %d texts of column %s have half a character (a surrogate alone), the first is at %s; "
        "U+FFFD stands in its place",
        data.where,
        len(halves),
        column,
        data.place(rows[halves[0]]),
    )
    for i in halves:
        texts[i] = "".join(_HALF if "\ud800" <= char <= "\udfff" else char for char in texts[i])
    return texts


def _is_cut(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _say_what_is_empty(texts: dict[str, list[str]], data: Table) -> None:
    """A prompt without any text says nothing of its label: most likely a mistake."""
    rows = zip(*texts.values(), strict=True)
    empty = [row for row, own in enumerate(rows) if not any(map(str.strip, own))]
    if empty:
        log.warning(
            "%s: %d of %d rows have no text (%s), the first is %s; they are used as they are",
            data.where,
            len(empty),
            len(data),
            ", ".join(texts),
            data.place(empty[0]),
        )


def _right(column: str, values: Sequence[Any], task: Task, data: Table) -> dict[str, list[Any]]:
    """What is right, of all rows: as column "label", or "answers" where it is generated."""
    if task.target:
        found = [
            right_answers(None if is_missing(value) else value, data.place(row))
            for row, value in enumerate(values)
        ]
        rows = [row for row, answers in enumerate(found) for _ in answers]
        whole = iter(_whole_characters([a for own in found for a in own], rows, column, data))
        return {"answers": [[next(whole) for _ in answers] for answers in found]}
    first = int(plain_name(column) in task.from_one)
    places = (f"{data.place(row)}, column {column!r}" for row in range(len(values)))
    pairs = zip(values, places, strict=True)
    return {"label": [parse_label(value, task, place, first) for value, place in pairs]}


def _check_kept_name(task: Task, where: str, partition_column: str) -> None:
    """What is right is kept as column "label" or "answers": no other column of that name can be
    kept too."""
    kept, what = ("answers", "answers") if task.target else ("label", "labels")
    taken = partition_column == kept and task.answer_column != kept
    if taken or kept in task.fields:
        use = "partition-column" if taken else "prompt"
        raise DataError(
            f"{where}: column {kept!r} cannot be used by {use}, the {what} of "
            f"{task.answer_column!r} are kept under that name; rename it in the data"
        )


def _ids(data: Table, column: str) -> dict[str, list[str]]:
    """The partition column as text. A row that is nobody's would make one more client."""
    ids = ["" if is_missing(value) else str(value) for value in data.values(column)]
    for row, own in enumerate(ids):
        if not own:
            raise DataError(
                f"{data.place(row)}: {column} (partition-column) is missing; say whose example it "
                "is, or remove the row"
            )
        if not own.isascii() and _is_cut(own):
            raise DataError(
                f"{data.place(row)}: {column} (partition-column) has half a character (a surrogate "
                "alone); mend it or remove the row"
            )
    return {column: ids}
