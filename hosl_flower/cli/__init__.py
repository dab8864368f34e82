"""The command line: `hosl-flower`, which is also `python -m hosl_flower`."""

import os
from typing import Annotated

import typer

from hosl_flower import __version__
from hosl_flower.cli import apps, predictions, runs
from hosl_flower.cli.group import Command, Group
from hosl_flower.cli.key_tables import keys

# read by OpenMP when torch is loaded: threads that wait must not spin on each other's cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

cli = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hosl-flower {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune Transformers with split federated learning on Flower."""


for command in (
    apps.new, apps.run, apps.simulate, runs.compare, runs.report, apps.plan, predictions.predict,
    predictions.evaluate, runs.generate, runs.export, keys,
):  # fmt: skip
    cli.command(cls=Command)(command)
