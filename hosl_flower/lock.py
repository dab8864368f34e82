"""A run directory belongs to one process at a time.

Stopping `flwr run` does not stop the ServerApp: a run that is resumed while it still goes on would
be written by two.
"""

import errno
import fcntl
from pathlib import Path
from typing import IO

from hosl_flower.errors import ConfigError

_NAME = ".lock"


def lock(directory: Path) -> IO[str]:
    """Take a directory, until `unlock` of what is returned, at the latest when this process ends.

    Raises ConfigError while another process has it.
    """
    file = (directory / _NAME).open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ConfigError(
                f"{directory} is being written by another process: wait for that run, or stop it "
                "(its ServerApp goes on when `flwr run` is interrupted: use `flwr stop`)"
            ) from error
        # a file system without locks: nothing to be had
    return file


def unlock(file: IO[str]) -> None:
    """Give a directory back."""
    Path(file.name).unlink(missing_ok=True)
    file.close()
