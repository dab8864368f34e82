"""The secret that a device's noise follows from (dp_scalars.py, activation_noise.py)."""

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from hosl_flower.errors import ConfigError

_BYTES = 32


def given(secret: bytes | None) -> bytes:
    """ValueError where there is none: noise that anybody can compute hides nothing."""
    if secret is None or len(secret) != _BYTES:
        raise ValueError(f"noise needs a secret of {_BYTES} bytes")
    return secret


def simulated_secret(seed: int) -> bytes:
    """Of a client that is simulated: a run can be repeated, and nobody is protected."""
    return hashlib.sha256(f"hosl-flower simulation {seed}".encode()).digest()


def device_secret(path: str) -> bytes:
    """This device's own, from a file that only its owner can read; made if it is not there.

    path: "" is ~/.local/share/hosl-flower/noise-secret, or where XDG_DATA_HOME says. ConfigError
    when there is none and none can be made, or it is not one.
    """
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    file = Path(path or f"{home}/hosl-flower/noise-secret").expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _make(file)
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise ConfigError(
                f"{file}, the secret of this device's noise, can be read by others: chmod 600 it, "
                "or remove it, if they may have, and a new one is made"
            )
        secret = bytes.fromhex(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the secret of this device's noise, {file}, cannot be read or made ({error}): set "
            "noise-secret in the node config to a file that can, on a file system with hard links"
        ) from error
    if len(secret) != _BYTES:
        raise ConfigError(
            f"{file} is no secret of {_BYTES} bytes in hexadecimal; remove it, and a new "
            "one is made"
        )
    return secret


def _make(file: Path) -> None:
    """Whole or not at all; whoever is first, wins."""
    handle, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # for its owner alone
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(os.urandom(_BYTES).hex() + "\n")
            out.flush()
            os.fsync(out.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, file)  # unlike a rename, it does not replace
    finally:
        os.unlink(part)
