"""The secret that a device's noise follows from (privacy.py, veil.py)."""

import hashlib
import os
from pathlib import Path

from hosl_flower.errors import ConfigError

_BYTES = 32


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
            part = file.with_name(f".{file.name}.{os.getpid()}")
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as out:
                out.write(os.urandom(_BYTES).hex() + "\n")
                out.flush()
                os.fsync(out.fileno())
            try:
                os.link(part, file)  # unlike a rename: whoever was first, wins
            except FileExistsError:
                pass
            finally:
                part.unlink()
        secret = bytes.fromhex(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the secret of this device's noise, {file}, cannot be read or made ({error}): set "
            "noise-secret in the node config to a file that can"
        ) from error
    if len(secret) != _BYTES:
        raise ConfigError(
            f"{file} is no secret of {_BYTES} bytes in hexadecimal; remove it, and a new "
            "one is made"
        )
    return secret
