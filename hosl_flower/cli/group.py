"""The group of commands: one place for errors, and for the help of arguments."""

import os
import sys
from typing import Any, get_args, get_type_hints

import click
import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from hosl_flower.errors import HoslError


def on_terminal() -> bool:
    """Return whether the output of a command is shown on a terminal."""
    return sys.stdout.isatty()


class Group(TyperGroup):
    """Commands whose HoslError is one line on standard error and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HoslError as error:
            Console(stderr=True, width=10_000 if not os.isatty(2) else None).print(
                f"error: {error}", style="bold red", markup=False, highlight=False
            )
            raise typer.Exit(1) from error


class Command(TyperCommand):
    """A command whose arguments keep their help, which Click 8.5 clears after Typer has set it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hints = get_type_hints(self.callback, include_extras=True)
        for param in self.params:
            infos = get_args(hints.get(str(param.name)))
            for info in infos:
                if isinstance(info, typer.models.ArgumentInfo):
                    param.help = info.help
