"""The command keys: the reference of the run-config keys, on a terminal or as Markdown."""

import re
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hosl_flower.cli.group import on_terminal
from hosl_flower.config.key_reference import choices, default, kind, sections
from hosl_flower.config.run_config import KEYS, Key
from hosl_flower.errors import ConfigError
from hosl_flower.methods.registry import registered, used_by

_COLUMNS = ("key", "values", "default", "used by", "meaning")


def keys(
    pattern: Annotated[
        str,
        typer.Argument(
            help="Show only keys whose name or meaning contains this text or regular expression.",
            show_default=False,
        ),
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> None:
    """List the run-config keys with their allowed values, defaults and meanings.

    Keys that only some methods use say which. Where the output is not a terminal, it is Markdown.
    """
    found = _found(pattern)
    if markdown or not on_terminal():
        typer.echo(as_markdown(found))
        return
    for title, rows in found.items():
        Console().print(_table(title, rows))


def _table(title: str, rows: list[Key]) -> Table:
    """A section for a terminal, whose columns must fit 80 characters."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("key", no_wrap=True)
    table.add_column("values", max_width=24)
    table.add_column("meaning", ratio=1)
    for key in rows:
        meaning = Text(str(key.field.description))
        if (using := users(key)) != "all":
            meaning.append(f"\nused by: {using}", style="dim")
        table.add_row(key.name, Text(f"{values(key)}\ndefault: {default(key)}"), meaning)
    return table


def as_markdown(found: dict[str, list[Key]] | None = None) -> str:
    """Return Markdown with a heading and a table for each section.

    Args:
        found: keys by the titles of their sections; all keys if it is not given.
    """
    lines = []
    for title, rows in (sections() if found is None else found).items():
        lines += [f"## {title}", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        for key in rows:
            allowed = ", ".join(f"`{choice}`" for choice in choices(key)) or kind(key)
            cells = (f"`{key.name}`", allowed, f"`{default(key)}`", users(key))
            lines.append(f"| {' | '.join(cells)} | {key.field.description} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def values(key: Key) -> str:
    """Return the allowed values of a key, or their type and range."""
    return ", ".join(choices(key)) or kind(key)


def users(key: Key) -> str:
    """Return the methods that use a key, or those that do not where they are fewer."""
    using, known = used_by().get(key.name), sorted(registered())
    if using is None or len(using) == len(known):
        return "all"
    others = [name for name in known if name not in using]
    return ", ".join(using) if len(using) <= len(others) else f"all except {', '.join(others)}"


def _found(pattern: str) -> dict[str, list[Key]]:
    """The keys that a pattern is in, by the titles of their sections."""
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error:
        wanted = re.compile(re.escape(pattern), re.IGNORECASE)
    found = {
        title: own
        for title, rows in sections().items()
        if (own := [k for k in rows if wanted.search(f"{k.name}\n{k.field.description}")])
    }
    if not found:
        raise ConfigError(
            f"no key or meaning contains {pattern!r}; `hosl-flower keys` lists all {len(KEYS)}"
        )
    return found
