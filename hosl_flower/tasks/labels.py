"""Labels as data files write them: numbers, words, in whatever case and form of Unicode."""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hosl_flower.errors import DataError
from hosl_flower.tasks.task import Task

MOST_LABELS = 1000
_LISTED = 20  # labels in a message
_MISSING = ("", "nan", "<na>")


def label_key(label: str) -> str:
    """A label in the one form it is compared in: "Sci/Tech" and " sci/tech " are one label."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def is_missing(value: Any) -> bool:
    """Whether a row has no such value: None, or the NaN that pandas has in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def label_text(value: Any, where: str) -> str:
    """A label as text, a whole number without its ".0"; "" where it is missing. DataError for what
    is no label."""
    if isinstance(value, list | dict | tuple | bytes):
        raise DataError(
            f"{where}: expected one label, a number or a word, got a {type(value).__name__}"
        )
    text = "" if is_missing(value) else str(value).strip()
    whole = re.fullmatch(r"(-?\d{1,9})\.0+", text)
    return whole[1] if whole else text


def is_no_label(text: str) -> bool:
    """Whether a label's text stands for a missing one."""
    return text.lower() in _MISSING


def same_labels(names: Sequence[str]) -> tuple[str, str] | None:
    """Two labels that differ in nothing but case, spaces or form of Unicode, if there are such."""
    seen: dict[str, str] = {}
    for name in names:
        if (key := label_key(name)) in seen:
            return seen[key], name
        seen[key] = name
    return None


@lru_cache(maxsize=8)
def _numbers(names: tuple[str, ...]) -> dict[str, int]:
    return {label_key(name): label for label, name in reversed(list(enumerate(names)))}


def parse_label(value: Any, task: Task, where: str, first: int = 0) -> int:
    """A label (int, bool, numeric string, name) -> 0..C-1.

    first: the number of the first label. Raises DataError that says `where`.
    """
    text = label_text(value, where)
    named = _numbers(task.label_names).get(label_key(text))
    if named is not None:
        return named
    text = text.lower()
    text = {"false": "0", "true": "1"}.get(text, text)
    counted = text.isascii() and text.isdigit() and len(text) < 10
    if any(name.isdigit() for name in task.label_names):  # then a number is a name, or nothing
        counted = False
    number = int(text) - first if counted else -1
    if 0 <= number < len(task.verbalizers):
        return number
    last, shown = first + len(task.verbalizers) - 1, _short(value)
    empty = is_no_label(text) or text in ("none", "null", "-1")
    if isinstance(value, str) and not task.label_names and not empty and _is_word(text):
        raise DataError(
            f"{where}: label {shown} is a word: say in verbalizers which answer each label has, "
            f"{text[:40]}=<answer>,... , or number the labels {first}..{last}"
        )
    names = f" or {listed(task.label_names)}" if task.label_names else ""
    raise DataError(
        f"{where}: label {shown} is not one of {first}..{last}{names}, "
        f"{'and rows without a label cannot be used' if empty else 'which have verbalizers'}"
    )


def _is_word(text: str) -> bool:
    return re.search(r"[^\W\d_]{2}", text) is not None


def _short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def listed(names: Sequence[str]) -> str:
    """Labels in a message."""
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
