"""Directories that a run writes to: checked before anything is loaded, and made under a name that
no other run has."""

import itertools
import tempfile
from pathlib import Path

from hosl_flower.errors import ConfigError


def check_writable(path: Path, key: str) -> None:
    """ConfigError that names a key when a directory cannot be written, or not be made."""
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=existing, prefix=".hosl-"):
            pass  # permissions alone do not tell: the file system may be read-only or full
    except OSError as error:
        raise ConfigError(f"{key}: cannot make or write {path}: {error}") from error


def claimed(path: Path) -> Path:
    """Make a directory or, where the name is taken, as by a run that began in the same second, one
    with -2, -3 and so on after it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            own.mkdir()
        except FileExistsError:
            continue
        return own
    raise AssertionError("unreachable")
