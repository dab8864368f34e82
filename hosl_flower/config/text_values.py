"""Values of the run config that are text: those that cannot be used."""

import os
import sys
import unicodedata

_PATHS = (
    "model", "data_path", "output_dir", "resume",
    "stream_certificate", "stream_key", "stream_authority",
)  # fmt: skip


_LONGEST_NAME = 255  # bytes, of file systems


def text_problem(name: str, value: str) -> str:
    """The reason for which a text cannot be the value of a field; "" for a good one."""
    if "\0" in value:
        return "it has a NUL character"
    if any("\ud800" <= c <= "\udfff" for c in value):  # as Python reads such arguments
        return "it has bytes that are not UTF-8"
    if name not in (*_PATHS, "run_name") or not value:
        return ""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        return f"the locale's encoding, {encoding}, cannot write it: set LC_ALL=C.UTF-8"
    if name == "run_name":
        return _name_problem(value)
    if name in _PATHS:
        longest = max(value.split("/"), key=_bytes)
        if _bytes(longest) > _LONGEST_NAME:
            return f"a part of it has {_bytes(longest)} bytes, file names have {_LONGEST_NAME}"
        if os.path.expanduser(value).startswith("~"):
            return f"the home directory {value.split('/')[0]!r} is not known: give an absolute path"
    return ""


def _name_problem(name: str) -> str:
    """Of a run directory's name."""
    bad = (c.isspace() or c in "/\\" or unicodedata.category(c) == "Cc" for c in name)
    if name[0] == "." or any(bad):
        return (
            "expected a directory's name that does not begin with '.', without spaces, slashes and "
            "control characters"
        )
    if _bytes(name) > _LONGEST_NAME:
        return f"it has {_bytes(name)} bytes, names of directories have {_LONGEST_NAME}"
    return ""


def _bytes(text: str) -> int:
    return len(os.fsencode(text))
