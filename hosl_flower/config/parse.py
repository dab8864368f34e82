"""A run config from keys and values, checked."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from hosl_flower.config.rules import contradictions
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError


def parse_config(values: Mapping[str, Any], origin: str = "the run config") -> RunConfig:
    """Validate kebab-case keys; one ConfigError lists everything that is wrong with them."""
    known = [field.alias or name for name, field in RunConfig.model_fields.items()]
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `python -m hosl_flower keys`"
            problems.append(f"{key}: no such key; {hint}")
    try:
        config = RunConfig(**{key: value for key, value in values.items() if key in known})
        problems += contradictions(config)
    except ValidationError as error:
        problems += [_describe(details) for details in error.errors()]
    if problems:
        raise ConfigError(f"{origin} is not valid:\n  " + "\n  ".join(problems))
    return config


def _describe(details: Any) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if details["type"].startswith("bool"):
        message = "expected true or false"
    elif details["type"] == "string_unicode":
        message = "it has bytes that are not UTF-8"
    if not details["loc"]:
        return message
    return f"{details['loc'][0]} = {details['input']!r}: {message[0].lower()}{message[1:]}"


def help_table() -> str:
    """The keys as a Markdown table, for docs/reference/keys.md and `python -m hosl_flower keys`."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for field in RunConfig.model_fields.values():
        default = json.dumps(field.default)  # JSON and TOML write these scalars alike
        lines.append(f"| `{field.alias}` | `{default}` | {field.description} |")
    return "\n".join(lines)
