"""A run config from keys and values, checked."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from hosl_flower.config.rules import contradictions
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.errors import ConfigError

# keys of earlier versions, none of which changed what is computed
GONE = frozenset({"stream-lifetime"})


def parse_config(
    values: Mapping[str, Any],
    origin: str = "the run config",
    origins: Mapping[str, str] | None = None,
) -> RunConfig:
    """Return the validated config of kebab-case keys.

    Args:
        values: the values by key.
        origin: where they are from, for the message.
        origins: where single keys are from, if that is another place.

    Raises:
        ConfigError: one that lists all unknown keys and wrong values.
    """
    places = {key: f" ({place})" for key, place in (origins or {}).items()}
    problems = [line + places.get(key, "") for key, line in unknown_keys(values).items()]
    try:
        config = RunConfig.from_keys({key: value for key, value in values.items() if key in KEYS})
        problems += contradictions(config)
    except ValidationError as error:
        order = list(KEYS)
        details = sorted(error.errors(), key=lambda one: order.index(str(one["loc"][-1])))
        problems += [_describe(one) + places.get(str(one["loc"][-1]), "") for one in details]
    if problems:
        raise ConfigError(f"{origin} is not valid:\n  " + "\n  ".join(problems))
    return config


def unknown_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return a line about each key that does not exist, with the nearest one that does."""
    lines = {}
    for key in keys:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `hosl-flower keys`"
            lines[key] = f"{key}: no such key; {hint}"
    return lines


def parse_recorded(values: Mapping[str, Any], origin: str) -> RunConfig:
    """The config that a run directory records, whose version may have had other keys."""
    return parse_config({k: v for k, v in values.items() if k not in GONE}, origin)


def _describe(details: Any) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if details["type"].startswith("bool"):
        message = "expected true or false"
    elif details["type"] == "string_unicode":
        message = "it has bytes that are not UTF-8"
    return f"{details['loc'][-1]} = {details['input']!r}: {message[0].lower()}{message[1:]}"
