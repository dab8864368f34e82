"""Examples in JSON: an object a line, one list of objects, or SQuAD's file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hosl_flower.data.readers.squad import is_squad, squad_rows
from hosl_flower.data.tables import TWICE, Objects
from hosl_flower.errors import DataError


def read_json(path: Path) -> Objects:
    """The examples of a file, whichever of the three it is. Raises DataError with the place."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path} is empty; expected an object a line")
    begin = text.lstrip()[0]
    if begin == "{" and is_squad(content := _whole(text)):
        found = list(squad_rows(content, str(path)))
        return Objects(str(path), [row for _, row in found], [place for place, _ in found], "")
    if begin == "[":
        return _list(path, text)
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(_object(_loaded(line, where), where))
            numbers.append(number)
    return Objects(str(path), rows, numbers)


def _list(path: Path, text: str) -> Objects:
    elements = _loaded(text, str(path))
    for number, row in enumerate(elements, start=1):
        _object(row, f"{path}, element {number}")
    return Objects(str(path), elements, range(1, len(elements) + 1), "element")


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}); expected an object a line, or one list of objects"
        ) from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which a key that is there twice has no value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        found |= {key: TWICE for key, count in counts.items() if count > 1}
    return found


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {json.dumps(row, default=str)[:40]!r}")
    return row


def _whole(text: str) -> Any:
    """A JSON file as one value; None where it is lines, each a value of its own."""
    try:
        return json.loads(text)
    except ValueError:
        return None
