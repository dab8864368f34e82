"""The run config of a Flower app directory, with the values given on the command line."""

import tomllib
from pathlib import Path
from typing import Any

from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.errors import ConfigError, first_line


def read_app_config(app: Path, overrides: list[str]) -> RunConfig:
    """The validated config of a Flower app directory; overrides are "key=value"."""
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
    return parse_config(
        {**values, **dict(map(key_value, overrides))},
        f"{path} with -c" if overrides else str(path),
    )


def key_value(text: str) -> tuple[str, Any]:
    """The pair ("steps", 5) of "steps=5": values are TOML scalars, but text keys need no quotes."""
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
