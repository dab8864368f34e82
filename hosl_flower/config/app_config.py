"""The run config of a Flower app directory, with the values given on the command line."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl_flower.config.parse import parse_config, unknown_keys
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.errors import ConfigError, first_line

_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


@dataclass(frozen=True)
class Given:
    """Run-config keys from the command line.

    Attributes:
        values: the values by key.
        origins: where each key was set, for messages.
    """

    values: dict[str, Any]
    origins: dict[str, str]


def read_app_config(
    app: Path, overrides: Sequence[str] = (), files: Sequence[Path] = ()
) -> RunConfig:
    """Return the validated config of a Flower app directory.

    Args:
        app: the directory.
        overrides: values of -c, each "key=value".
        files: values of --config.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key or a wrong value.
    """
    given = given_keys(overrides, files)
    path = app / "pyproject.toml"
    try:
        with path.open("rb") as file:  # TOML is UTF-8, whatever the locale says
            values = tomllib.load(file)["tool"]["flwr"]["app"].get("config", {})
            values = dict(values)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected a Flower app directory"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML in UTF-8: {first_line(error)}") from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} has no sections [tool.flwr.app] and [tool.flwr.app.config] ({error!r}); "
            "expected a Flower app directory"
        ) from error
    added = [*map(str, files), *["-c"] * bool(overrides)]
    origin = f"{path} with {' and '.join(added)}" if added else str(path)
    return parse_config({**values, **given.values}, origin, given.origins)


def given_keys(overrides: Sequence[str] = (), files: Sequence[Path] = ()) -> Given:
    """Return the keys of -c and --config. Later files override earlier ones, and -c overrides all.

    Args:
        overrides: values of -c, each "key=value".
        files: values of --config.

    Raises:
        ConfigError: for a file that cannot be read, or text that is not "key=value".
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        found, lines = _read_keys(file)
        values |= found
        origins |= {key: f"{file}{lines.get(key, '')}" for key in found}
    pairs = dict(map(key_value, overrides))
    return Given(values | pairs, origins | dict.fromkeys(pairs, "-c"))


def check_known(given: Given) -> None:
    """Refuse keys that do not exist.

    Raises:
        ConfigError: one that lists all of them, with their places.
    """
    lines = [f"{given.origins[key]}: {line}" for key, line in unknown_keys(given.values).items()]
    if lines:
        raise ConfigError("\n  ".join(lines))


def _read_keys(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of a TOML file, and ", line 3" for those that are found again in its text."""
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        advice = f"; to set a key, use -c {file}" if "=" in str(file) else ""
        raise ConfigError(
            f"--config {file} cannot be read ({error.strerror}); expected a TOML file with "
            f"run-config keys{advice}"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {file} is not TOML in UTF-8: {first_line(error)}") from error
    lines = {
        found[1]: f", line {number}"
        for number, line in enumerate(text.splitlines(), start=1)
        if (found := _KEY.match(line))
    }
    for key, value in values.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{file}: {key} is a table; expected keys without tables, such as steps = 100"
            )
    return values, lines


def key_value(text: str) -> tuple[str, Any]:
    """Return the pair ("steps", 5) of "steps=5".

    Values are TOML scalars, but values of text keys need no quotes.

    Raises:
        ConfigError: for text without a key or "=".
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"-c {text!r}: expected key=value, for example -c steps=100")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
        tomllib.loads(f"values = [{value}]")  # nor is there a comment or a second line in it
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, value
    wants_text = key in KEYS and KEYS[key].field.annotation is str
    return key, value if wants_text and not isinstance(parsed, str) else parsed
