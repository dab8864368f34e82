"""The Hugging Face hub: is it there, one file of a repository, and a new repository.

A device in the field is often offline. huggingface_hub's own retries can then take minutes,
so reachability is probed once, within seconds, and everything after goes through the cache.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from hosl_flower.errors import ConfigError, HoslError, ModelError, first_line
from hosl_flower.system import proxies

PROBE_SECONDS = 4.0
_LFS = b"version https://git-lfs.github.com/spec/"  # what a pointer begins with


@cache
def is_reachable() -> bool:
    """Whether the hub answers within PROBE_SECONDS; asked once per process.

    HF_HUB_OFFLINE=1 counts as unreachable. In a thread of its own, because the time a name
    server takes is not bounded by a connect timeout.
    """
    if constants.HF_HUB_OFFLINE or proxies.unusable():
        return False
    answer: list[bool] = []

    def probe() -> None:
        try:
            status = httpx.head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code
            # 403, 407, 511 are proxies and portals that do not let us through
            answer.append(status < 500 and status not in (403, 407))
        except (httpx.HTTPError, OSError):
            answer.append(False)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answer and answer[0])


def proxy_note() -> str:
    """A clause that names the proxy through which the hub is asked, or one that cannot be used, for
    messages that say the hub cannot be reached; "" without one."""
    proxy = "" if constants.HF_HUB_OFFLINE else proxies.between(constants.ENDPOINT)
    return f" (proxy: {proxy})" if proxy else ""


def locate(model: str, filename: str) -> Path | None:
    """One file of a model given as a local directory or hub id; None where it has no such file.

    Raises ModelError when the model itself cannot be had, or the file cannot be read.
    """
    directory = local_directory(model)
    path = fetch(model, filename) if directory is None else directory / filename
    if path is None or not (path.is_file() or path.is_symlink()):
        return None
    check_readable(path)
    return path


def check_readable(path: Path) -> None:
    """ModelError for a file that may not be read, a link to nothing, or a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {_reason(error)}") from error
    if pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
            f"{path.parent} (git-lfs must be installed), or download the file"
        )


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that does not exist"
    return (error.strerror or str(error)).lower()


def local_directory(model: str) -> Path | None:
    """The directory a model name means, None when it is a hub id.

    Raises ModelError for what can only be a path and is not there, is a file or cannot be
    read.
    """
    try:
        directory = Path(model).expanduser()
        is_file = directory.is_file()
        if directory.is_dir():
            with contextlib.suppress(FileNotFoundError):  # which files there are must be known
                (directory / "config.json").stat()
            return directory
    except (OSError, RuntimeError) as error:  # RuntimeError: the home directory of nobody
        reason = _reason(error) if isinstance(error, OSError) else first_line(error)
        raise ModelError(f"model directory {model!r} cannot be read: {reason}") from error
    if is_file:
        raise ModelError(
            f"model = {model!r} is a file, expected the directory of a Hugging Face model: the one "
            "that has its config.json, weights and tokenizer"
        )
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model directory {model!r} does not exist")
    return None


def fetch(repository: str, filename: str) -> Path | None:
    """The local path of one file of a hub repository, downloaded unless cached.

    None when the repository has no such file. Raises ModelError when the repository
    cannot be had: not cached and no hub, unknown name, no permission.
    """
    offline = not is_reachable()
    try:
        return Path(hf_hub_download(repository, filename, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        if _is_cached(repository):  # the snapshot is there, this file is not part of it
            return None
        raise ModelError(
            f"{repository!r} is no directory ({_here(repository)} is not there), it is not in the "
            f"local Hugging Face cache, and {constants.ENDPOINT} cannot be reached"
            f"{proxy_note()}; give the absolute path of a local model directory, or connect"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, PermissionError) or getattr(error, "errno", 0) == errno.EROFS:
            raise ModelError(
                f"the Hugging Face cache cannot be written: {error}; set HF_HOME to a directory "
                "that can"
            ) from error
        raise ModelError(
            f"the hub does not give {filename!r} of {repository!r}: {first_line(error)}; "
            "check the name and, for a gated model, HF_TOKEN; there is no directory "
            f"{_here(repository)} either"
        ) from error


def _here(name: str) -> Path:
    """The directory that a name would mean, were it one."""
    return Path(name).expanduser().absolute()


def cached(repository: str, filename: str) -> Path | None:
    """The local path of one file of a hub repository if it is in the cache, whole."""
    path = try_to_load_from_cache(repository, filename)
    return Path(path) if isinstance(path, str) else None


def _is_cached(repository: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.glob("*/config.json"))


def check_name(repository: str) -> None:
    """ConfigError unless it can be the id of a repository of one's own."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push = {repository!r}: {first_line(error)}") from error


def push(directory: Path, repository: str, private: bool) -> str:
    """Upload a directory to a model repository, which is made if it is not there; its address.

    private: of a new one; one that is there stays what it is. Raises HoslError when the hub does
    not take it; what it has taken before is there then.
    """
    from huggingface_hub import HfApi  # a client needs none of it

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError) as error:
        raise HoslError(
            f"{constants.ENDPOINT} does not take {directory} as {repository!r}: "
            f"{first_line(error)}; check the name, the connection, and HF_TOKEN, which must be "
            "allowed to write"
        ) from error
    return str(url)


def cache_directory() -> Path:
    """Where derived files are kept: $HOSL_CACHE or ~/.cache/hosl-flower."""
    root = Path(os.environ.get("HOSL_CACHE") or "~/.cache/hosl-flower")
    try:
        return root.expanduser()
    except RuntimeError as error:  # a user id without an account
        raise ModelError(
            f"{root} is unknown, since there is no home directory: set HOSL_CACHE to a directory "
            "that can be written"
        ) from error


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """Within it, a cache directory that cannot be used is a ModelError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        if isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError):
            raise  # of the network
        raise ModelError(
            f"the cache of hosl-flower cannot be read or written: {error}; set HOSL_CACHE to a "
            "directory that can, with room for a copy of the model's weights"
        ) from error
