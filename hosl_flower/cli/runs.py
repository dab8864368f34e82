"""Commands that make runs comparable or take finished ones: compare, report, export, generate."""

from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.cli.apps import Override
from hosl_flower.compare.experiment_file import read_file
from hosl_flower.config.app_config import key_value
from hosl_flower.errors import ConfigError
from hosl_flower.export.finished_run import check_source, read_run
from hosl_flower.models.checkpoints import hub
from hosl_flower.report.runs import run_directories


def compare(
    experiment: Annotated[Path, typer.Argument(help="a TOML file: methods x variants x seeds")],
    out: Annotated[Path, typer.Option(help="where runs, tables and figures go")] = Path(
        "runs/compare"
    ),
    processes: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    config: Override = None,
) -> None:
    """Tune, run and tabulate methods against each other; finished runs are not run again."""
    overrides = dict(map(key_value, config or []))
    read_file(experiment, overrides)  # before seconds of imports
    from hosl_flower.compare.compare import compare as run_comparison

    typer.echo(run_comparison(experiment, out, processes, overrides))


def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, e.g. runs/20261124-190634")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
) -> None:
    """One HTML page of one or several runs, side by side: opens from disk, without a network."""
    run_directories(runs)  # before the import of matplotlib
    from hosl_flower.report.page import write_page

    typer.echo(f"report: {write_page(runs, out)}")


def export(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    directory: Annotated[Path, typer.Argument(help="what to make; must not be there yet")],
    what: Annotated[str, typer.Option(help="model, adapters, client or server")] = "model",
    push: Annotated[str, typer.Option(help="and upload it to this hub repository")] = "",
    private: Annotated[bool, typer.Option("--private", help="make that repository so")] = False,
) -> None:
    """A trained model as a directory of its own: merged, adapters, or one half; with a card."""
    if push:
        hub.check_name(push)
    elif private:
        raise ConfigError("--private has no use without --push")
    read_run(run.expanduser().absolute())  # before seconds of imports
    from hosl_flower.export.export import export_run

    made = export_run(run, directory, what)
    typer.echo(f"exported: {made.resolve()}")
    if push:
        typer.echo(f"pushed: {hub.push(made, push, private)}")


def generate(
    run: Annotated[str, typer.Argument(help="a run directory; or a model, with --cut-layer")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 50,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest with this share")] = 1.0,
    seed: Annotated[int, typer.Option(help="of draws")] = 0,
    cut_layer: Annotated[int | None, typer.Option(help="default: where the run cut")] = None,
) -> None:
    """Continue a prompt through the split: the client's half, then the server's."""
    check_source(run, cut_layer)  # before seconds of imports
    from hosl_flower.export import generate as generation

    choose = generation.chooser(temperature, top_p, seed)
    typer.echo(generation.continuation(run, prompt, max_new_tokens, choose, cut_layer))
