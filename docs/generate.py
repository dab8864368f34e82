"""Write docs/reference/keys.md, docs/reference/commands.md and simulations/*/pyproject.toml.

python docs/generate.py

They come from the code and from hosl_flower/flower/templates/. tests/test_docs.py and
tests/flower/test_app_template.py fail when the committed files are not what this writes.
"""

import textwrap
from pathlib import Path

import click
import typer

from hosl_flower.cli import cli
from hosl_flower.cli.key_tables import as_markdown
from hosl_flower.flower.app_template import pyproject, read_template, template_names

SIMULATIONS = Path(__file__).parents[1] / "simulations"
REFERENCE = Path(__file__).parent / "reference"

KEYS = """# Run-config keys

Set a key in the `pyproject.toml` of an app, or for one run with `-c key=value`, or in a TOML file
that you pass with `--config`. `-c` overrides the file, the file overrides the app. `flwr run
--run-config` accepts only keys that the app's `pyproject.toml` lists. Apps that `hosl-flower new`
creates list all of them.

`hosl-flower keys` shows these tables on a terminal. `hosl-flower keys rate` shows only the keys
about rates.

The column "used by" names the methods that use a key.

{table}
"""

COMMANDS = """# Commands

`hosl-flower <command> --help` prints the same. `python -m hosl_flower` is the same command. Plain
`flwr run` needs none of them.
"""


def keys_page() -> str:
    """The table of run-config keys."""
    return KEYS.format(table=as_markdown())


def commands_page() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(cli)
    assert isinstance(group, click.Group)
    sections = [_section(name, command) for name, command in group.commands.items()]
    return "\n".join([COMMANDS, *sections])


def simulations() -> dict[Path, str]:
    """The pyproject.toml of every simulation that has a template."""
    return {
        SIMULATIONS / name.replace("-", "_") / "pyproject.toml": pyproject(read_template(name))
        for name in template_names()
    }


def _section(name: str, command: click.Command) -> str:
    usage = " ".join(["hosl-flower", name, *map(_usage, command.params)])
    usage = textwrap.fill(usage, 88, subsequent_indent="    ", break_on_hyphens=False)
    lines = [f"## {name}", _paragraphs(command.help), "", f"```text\n{usage}\n```"]
    if command.params:
        lines += ["", "| argument, option | default | meaning |", "|---|---|---|"]
        lines += map(_row, command.params)
    return "\n".join(lines) + "\n"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(map(_sentence, (text or "").split("\n\n")))


def _usage(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        shown = str(param.name).upper() + ("..." if param.nargs != 1 else "")
        return shown if param.required else f"[{shown}]"
    if not (isinstance(param, click.Option) and param.is_flag):
        value = param.metavar or param.type.name.split()[0].upper()
        return f"[{param.opts[0]} {value}]" + ("..." if param.multiple else "")
    return f"[{param.opts[0]}]"


def _row(param: click.Parameter) -> str:
    shown = str(param.name).upper() if isinstance(param, click.Argument) else ", ".join(param.opts)
    default = "" if param.default in (None, "", False) or param.required else f"`{param.default}`"
    return f"| `{shown}` | {default} | {_sentence(getattr(param, 'help', ''))} |"


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "keys.md").write_text(keys_page(), encoding="utf-8")
    (REFERENCE / "commands.md").write_text(commands_page(), encoding="utf-8")
    for path, text in simulations().items():
        path.write_text(text, encoding="utf-8")
