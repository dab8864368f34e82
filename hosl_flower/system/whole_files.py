"""Files and directories that appear whole or not at all, with the modes that the umask asks for.

A full disk is an OSError here whatever library met it, and leaves nothing half-written behind.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


def put(path: Path, content: str | bytes) -> None:
    """Write a file. OSError when it cannot be written; a file that was there stays as it was."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:  # x: a link that lies there is not followed
            file.write(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when the block is left without an error and is
    removed otherwise. OSError when something in it cannot be written."""
    part = directory.with_name(f".{directory.name}.part")
    remove(part)  # of a process that was killed
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(directory)
    except BaseException as error:
        remove(part)
        # the tokenizers library reports a failed write as a plain Exception
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def remove(path: Path) -> None:
    """Remove a directory with what is in it, or a link to one, as far as that is possible."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, which other users may read if the umask lets them: the library
    makes files that are their owner's alone. OSError when it cannot be written."""
    from safetensors.torch import save_file  # whoever has tensors has torch

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


class Lines:
    """A file that lines are added to. Lines that cannot be written are held, and written with the
    next ones when there is room again."""

    def __init__(self, path: Path):
        self.path = path
        self._held: list[str] = []

    def hold(self, line: str) -> None:
        """Add a line with the next `flush`."""
        self._held.append(line + "\n")

    def flush(self) -> None:
        """Write the lines that are held. OSError when that fails: the file is as it was then."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._held))
        except OSError:
            os.truncate(self.path, size)
            raise
        self._held.clear()
