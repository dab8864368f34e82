"""Reading a run directory that may come from elsewhere.

Whoever made it may have put links, devices or nonsense in place of files. A link that leads out of
the directory is refused: what it points to would be published with the model or shown on a page.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from hosl_flower.errors import CheckpointError

MOST_BYTES = 1 << 30  # of a file that is read whole


def check_file(directory: Path, path: Path) -> Path:
    """A file of a directory, with its links followed. CheckpointError unless it is a regular file
    in the directory, FileNotFoundError where there is none."""
    real = _followed(directory, path)
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{path} is no regular file; expected a file that a run wrote")
    return real


def check_tree(directory: Path, path: Path) -> None:
    """CheckpointError unless all that is under a path are regular files in the directory."""
    if not _followed(directory, path).is_dir():
        check_file(directory, path)
        return
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():  # to a file; a directory might lead to itself
            check_file(directory, entry)
        else:
            check_tree(directory, entry)


def _followed(directory: Path, path: Path) -> Path:
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # links that lead to each other
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not real.is_relative_to(directory.resolve()):
        raise CheckpointError(
            f"{path} is a link that leads out of {directory}, to {real}: put the file itself there "
            "if it belongs to the run"
        )
    return real


def read_bytes(directory: Path, path: Path, most: int = MOST_BYTES) -> bytes:
    """A file of a directory. CheckpointError when it is no regular file in it or has more bytes
    than `most`, other errors as of any file."""
    return read_regular(check_file(directory, path), most)


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file, through links too. CheckpointError when it is no regular file, which might never
    end, or has more bytes than `most`."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        if found.st_size > most:
            raise CheckpointError(f"{path} has {found.st_size} bytes; expected at most {most}")
        return file.read()


def parse_json(content: bytes) -> Any:
    """JSON. ValueError when it is none, or nested so deeply that reading it takes all the stack."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(directory: Path, path: Path) -> Any:
    """A JSON file of a directory. CheckpointError when it cannot be read, FileNotFoundError or
    NotADirectoryError where there is none."""
    try:
        return parse_json(read_bytes(directory, path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
