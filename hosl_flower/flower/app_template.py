"""Flower apps from the templates in templates/: `hosl-flower new`, and the apps in simulations/.

A template holds the run-config keys that differ from the defaults; an app lists every key,
because `flwr run --run-config` accepts no others.
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosl_flower.config.run_config import KEYS
from hosl_flower.config.value_types import Scalar
from hosl_flower.errors import ConfigError, HoslError

TEMPLATES = Path(__file__).with_name("templates")

# the first key of each section
SECTIONS = {
    "strategy": "Method, model and device",
    "task": "Task and data",
    "num-clients": "Clients, steps and evaluation",
    "directions": "Probes, aggregation, privacy, optimizers and LoRA",
    "output-dir": "Results, checkpoints and deadlines",
    "link": "Transport",
}

_PROJECT = """\
[project]
name = {name}
version = "0.1.0"
description = {description}
license = "Apache-2.0"
dependencies = [] # hosl-flower itself is installed beside Flower, see README.md

[tool.flwr.app]
publisher = "hosl-flower"

[tool.flwr.app.components]
serverapp = "hosl_flower.flower.server_app:app"
clientapp = "hosl_flower.flower.client_app:app"

# Every key is listed: `flwr run --run-config` accepts only keys that it finds here.
# `hosl-flower keys` describes them.
[tool.flwr.app.config]
"""

_README = """\
# {name}

{about}

## Run the app

Run these commands in this directory:

```sh
pip install 'hosl-flower[simulation]'
hosl-flower plan .          # estimate the memory, traffic and time of a client
hosl-flower run .           # train in this process, without Flower
hosl-flower simulate .      # train through Flower, with the same numbers
flwr run . --stream         # train as any Flower app
```

If the Hugging Face hub cannot be reached and its cache does not have the model or the data, random
weights and bundled data replace them. The first lines of the log then say so.
`-c offline-fallback=false` makes that an error.

## Change the settings

`pyproject.toml` lists every run-config key, and `hosl-flower keys` describes them. Set a key for
one run with `-c key=value`, for example `-c steps=50`. These keys differ from their defaults:

| key | value | default | meaning |
|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Template:
    """An app in short: description, text of the README, and what differs from the defaults.

    comments: for keys, written after their values.
    """

    name: str
    description: str
    about: str
    config: dict[str, Scalar]
    comments: dict[str, str] = field(default_factory=dict)


def template_names() -> list[str]:
    """List the names of all templates, the default first."""
    names = sorted(path.stem for path in TEMPLATES.glob("*.toml"))
    return sorted(names, key=lambda name: name != "quickstart")


def read_template(name: str) -> Template:
    """Read a template.

    Raises:
        ConfigError: if there is no template of this name.
    """
    if name not in template_names():
        known = ", ".join(template_names())
        raise ConfigError(f"--from = {name!r} is not a template; expected one of {known}")
    text = (TEMPLATES / f"{name}.toml").read_text(encoding="utf-8")
    return Template(name=name, **tomllib.loads(text))


def pyproject(template: Template) -> str:
    """Write the pyproject.toml of an app: the project, and every run-config key with its value."""
    name, description = json.dumps(template.name), json.dumps(template.description)
    lines = [_PROJECT.format(name=name, description=description).rstrip()]
    for key, default, _ in _keys():
        if key in SECTIONS:
            lines += [""] * (len(lines) > 1) + [f"# {SECTIONS[key]}"]
        comment = f"  # {template.comments[key]}" if key in template.comments else ""
        lines.append(f"{key} = {_toml(template.config.get(key, default))}{comment}")
    return "\n".join(lines) + "\n"


def readme(template: Template) -> str:
    """Write the README.md of an app: how to run it, and which keys differ from the defaults."""
    rows = [
        f"| `{key}` | `{_toml(template.config[key])}` | `{_toml(default)}` | {description} |"
        for key, default, description in _keys()
        if key in template.config
    ]
    about = template.about.strip()
    return _README.format(name=template.name, about=about, rows="\n".join(rows))


def new_app(directory: Path, template: str) -> Path:
    """Create a Flower app.

    Args:
        directory: where; it may exist if it is empty.
        template: one of `template_names()`.

    Returns:
        The absolute path of the directory.

    Raises:
        ConfigError: if the directory is not empty, is a file, or there is no such template.
        HoslError: if the app cannot be written.
    """
    found = read_template(template)
    directory = directory.expanduser().absolute()
    try:
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is not empty; name another directory")
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in {
            "pyproject.toml": pyproject(found),
            "README.md": readme(found),
            ".gitignore": "/runs/\n",  # Flower sends what git does not ignore with every run
        }.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise HoslError(f"{directory} cannot be written: {error}") from error
    return directory


def _keys() -> list[tuple[str, Any, str]]:
    """Key, default and description of every run-config key."""
    return [(key.name, key.field.default, str(key.field.description)) for key in KEYS.values()]


def _toml(value: Scalar) -> str:
    """Write a TOML scalar, 1e-05 as 1e-5."""
    text = json.dumps(value)  # JSON and TOML write these scalars alike
    return text.replace("e-0", "e-") if isinstance(value, float) else text
