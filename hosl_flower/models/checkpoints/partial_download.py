"""Single tensors of a model on the hub, by HTTP range requests: who holds half a model downloads
half of it.

A safetensors file begins with a header that says where each tensor is, so that one needs no more
than the header and the ranges of one's own tensors. Each tensor is kept in the cache as a
safetensors file of its own, below the hash of the file it is from; one that came halfway is
continued where it stopped, in this process or a later one.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hosl_flower.errors import ModelError, first_line
from hosl_flower.models.checkpoints import hub

_MOST_HEADER = 100 << 20  # bytes: the format's own limit
_ATTEMPTS = 5  # that bring nothing new, one after another
_PAUSE = 0.5  # seconds before the second of them, then twice as long each time
_SECONDS = 30.0  # without a byte


class _NoRanges(Exception):
    """The server sends files whole or not at all."""


@dataclass(frozen=True)
class RemoteFile:
    """A safetensors file of a hub repository. entries: its header; data_start: where data begins;
    directory: of its cached pieces."""

    name: str
    url: str
    directory: Path
    entries: dict[str, dict[str, Any]]
    data_start: int

    def keys(self) -> list[str]:
        """Names of all its tensors, here or not."""
        return list(self.entries)

    def tensor(self, key: str) -> Path:
        """A local safetensors file that holds one tensor, downloaded unless cached. Raises
        ModelError when the hub does not give it."""
        path = self.directory / f"{_plain(key)}.safetensors"
        with hub.using_cache():
            if path.is_file():
                return path  # also in a cache of another user, where no lock can be taken
            with FileLock(f"{path}.lock"):  # several clients on one machine may want it
                if not path.is_file():
                    self._download(key, path)
        return path

    def _download(self, key: str, path: Path) -> None:
        entry = self.entries[key]
        first, last = entry["data_offsets"]
        header = json.dumps({key: {**entry, "data_offsets": [0, last - first]}}).encode()
        header = len(header).to_bytes(8, "little") + header
        what = f"{key!r} of {self.name}"
        span = self.data_start + first, self.data_start + last
        try:
            _complete(path, header, self.url, span, what)
        except (HfHubHTTPError, _NoRanges) as error:
            raise ModelError(f"the hub does not give {what}: {first_line(error)}") from error


def locate(repository: str, filename: str) -> RemoteFile | Path | None:
    """A safetensors file of a hub repository: what is known of it, or its path where it is cached
    whole or the server knows no ranges; None where the repository has no such file. Raises
    ModelError when the repository cannot be had."""
    whole = hub.cached(repository, filename)
    if whole is not None:
        return whole
    try:
        with hub.using_cache():
            directory = _latest(repository, filename)
            if directory is not None:
                return _opened(repository, filename, directory)
        return hub.fetch(repository, filename)  # says what is wrong, or that there is none
    except EntryNotFoundError:
        return None
    except _NoRanges:
        return hub.fetch(repository, filename)
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"the hub does not give {filename!r} of {repository!r}: {first_line(error)}; "
            "check the name and, for a gated model, HF_TOKEN"
        ) from error


def _latest(repository: str, filename: str) -> Path | None:
    """The directory of the file's pieces: of the version there is on the hub or, without a hub, of
    the one seen last; None where there was none."""
    own = hub.cache_directory() / "tensors" / _plain(repository) / _plain(filename)
    seen = own / "latest"
    if not hub.is_reachable():
        return own / seen.read_text(encoding="utf-8") if seen.is_file() else None
    known = get_hf_file_metadata(hf_hub_url(repository, filename))
    version = _plain(known.etag or known.commit_hash or "")
    directory = own / version
    directory.mkdir(parents=True, exist_ok=True)
    if known.commit_hash:  # what is downloaded later is of the same version
        _remember(directory / "commit", known.commit_hash)
    _remember(seen, version)
    return directory


def _remember(file: Path, text: str) -> None:
    """Write a small file, unless it says so: the cache may be another user's."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _opened(repository: str, filename: str, directory: Path) -> RemoteFile:
    commit, stored = directory / "commit", directory / "header.json"
    revision = commit.read_text(encoding="utf-8") if commit.is_file() else None
    url, name = hf_hub_url(repository, filename, revision=revision), f"{repository}/{filename}"
    if not stored.is_file():
        length = directory / "header.length"
        _complete(length, b"", url, (0, 8), name)
        size = int.from_bytes(length.read_bytes(), "little")
        if not 2 <= size <= _MOST_HEADER:
            raise ModelError(f"{name} is no safetensors file: its header has {size} bytes")
        _complete(stored, b"", url, (8, 8 + size), name)
    header = stored.read_bytes()
    return RemoteFile(name, url, directory, _check(header, name), 8 + len(header))


def _check(header: bytes, name: str) -> dict[str, dict[str, Any]]:
    """A header's entries. The dtype and shape of each are checked where the tensor is read."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ranges = [entry["data_offsets"] for entry in entries.values()]
        sound = all(0 <= first <= last for first, last in ranges)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{name} is no safetensors file: {first_line(error)}") from error
    if not sound:
        raise ModelError(f"{name} is no safetensors file: a tensor ends before it begins")
    return entries


def _complete(path: Path, prefix: bytes, url: str, span: tuple[int, int], what: str) -> None:
    """Make a file of a prefix and a span of bytes of what is at a URL; what is there of it, from an
    attempt that ended halfway, is kept. Raises ModelError when nothing comes any more."""
    start, end = span
    part, size = path.with_name(f"{path.name}.part"), len(prefix) + end - start
    if not part.is_file() or not len(prefix) <= part.stat().st_size <= size:
        part.write_bytes(prefix)
    failures = 0
    while (have := part.stat().st_size) < size:
        try:
            with part.open("ab") as file:
                for chunk in _range(url, start + have - len(prefix), end):
                    file.write(chunk)
        except httpx.TransportError as error:
            failures = failures + 1 if part.stat().st_size == have else 0
            if failures == _ATTEMPTS:
                raise ModelError(
                    f"{what} stopped after {have - len(prefix)} of {end - start} bytes: "
                    f"{first_line(error)}; start again to go on there"
                ) from error
            time.sleep(_PAUSE * 2**failures)
    part.rename(path)


def _range(url: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes start..end-1 of what is at a URL, as they come. _NoRanges for an answer with others."""
    if start == end:
        return
    own = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(), **own}
    with get_session().stream("GET", url, headers=headers, timeout=_SECONDS) as response:
        hf_raise_for_status(response)
        expected = f"bytes {start}-{end - 1}/"
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(
            expected
        ):
            raise _NoRanges(f"the server answers a request for a range with {response.status_code}")
        left = end - start
        for chunk in response.iter_raw():  # as they come: all that has come is kept
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return


def _plain(name: str) -> str:
    """A file name for it: its own where that is harmless."""
    if re.fullmatch(r"\w[\w.-]{0,150}", name, re.ASCII):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:32]
