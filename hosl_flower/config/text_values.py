"""Values of the run config that are text: checks, and lists of words."""

import os
import sys
import unicodedata

_LONGEST_NAME = 255  # bytes, of file systems


def split_words(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def checked_text(value: str) -> str:
    """The text itself; ValueError where no key can have it."""
    if "\0" in value:
        raise ValueError("it has a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in value):  # as Python reads such arguments
        raise ValueError("it has bytes that are not UTF-8")
    return value


def checked_path(value: str) -> str:
    """The path itself; ValueError where no file can have it. Empty is none."""
    _check_encoding(checked_text(value))
    longest = max(value.split("/"), key=_bytes)
    if _bytes(longest) > _LONGEST_NAME:
        raise ValueError(
            f"a part of it has {_bytes(longest)} bytes, file names have {_LONGEST_NAME}"
        )
    if os.path.expanduser(value).startswith("~"):
        raise ValueError(
            f"the home directory {value.split('/')[0]!r} is not known: give an absolute path"
        )
    return value


def checked_name(value: str) -> str:
    """The name itself; ValueError where no directory can have it. Empty is none."""
    _check_encoding(checked_text(value))
    bad = (c.isspace() or c in "/\\" or unicodedata.category(c) == "Cc" for c in value)
    if value.startswith(".") or any(bad):
        raise ValueError(
            "expected a directory's name that does not begin with '.', without spaces, slashes and "
            "control characters"
        )
    if _bytes(value) > _LONGEST_NAME:
        raise ValueError(f"it has {_bytes(value)} bytes, names of directories have {_LONGEST_NAME}")
    return value


def _check_encoding(value: str) -> None:
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(
            f"the locale's encoding, {encoding}, cannot write it: set LC_ALL=C.UTF-8"
        ) from None


def _bytes(text: str) -> int:
    return len(os.fsencode(text))
