"""A run directory belongs to one run, and to one process at a time.

Stopping `flwr run` does not stop the ServerApp: a run that is resumed while it still goes on would
be written by two.
"""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from hosl_flower.errors import ConfigError
from hosl_flower.system.directories import claimed

log = logging.getLogger("hosl_flower")

_NAME = ".lock"  # it stays: without it, of two runs one could hold the old file and one a new one
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(directory: Path) -> FileLock:
    """Take a directory, until the lock is released, at the latest when this process ends.

    Raises ConfigError while another run has it, of this process or of another one, and when it
    cannot be written.
    """
    path = directory / _NAME
    taken = FileLock(path, thread_local=False)
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{directory} is being written by another process or run: wait for it, or stop it "
            "(its ServerApp goes on when `flwr run` is interrupted: use `flwr stop`)"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(
                f"{path} cannot be locked ({error}): expected a directory that this user can write "
                "to, and no link of that name in it"
            ) from error
        log.warning("%s: its file system has no locks, nothing keeps another run out", directory)
    return taken


def claim(directory: Path, named: bool) -> tuple[Path, FileLock]:
    """Make and take the directory of a new run; one of a default name that is taken gets a number.

    named: by the user. Raises ConfigError when it holds a run or another run has it, OSError when
    it cannot be made.
    """
    if named:
        directory.mkdir(parents=True, exist_ok=True)
        taken = lock(directory)
        refuse_used(directory)  # only now can no other run begin there
        return directory, taken
    path = claimed(directory)
    return path, lock(path)


def refuse_used(directory: Path) -> None:
    """ConfigError for a directory, or file, that holds anything."""
    if directory.is_dir():
        # of another run that looks whether it can write here there may be a .hosl- directory
        used = any(not p.name.startswith((_NAME, ".hosl-")) for p in directory.iterdir())
    else:
        used = directory.exists() or directory.is_symlink()
    if used:
        raise ConfigError(f"{directory} already holds a run; choose another run-name")
