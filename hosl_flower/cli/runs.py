"""Commands for several or finished runs: compare, report, export and generate."""

from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.cli.apps import Files, Override
from hosl_flower.compare.experiment_file import read_file
from hosl_flower.config.app_config import check_known, given_keys
from hosl_flower.errors import ConfigError
from hosl_flower.export.finished_run import check_source, read_run
from hosl_flower.models.checkpoints import hub
from hosl_flower.report.runs import run_directories


def compare(
    experiment: Annotated[
        Path, typer.Argument(help="Experiment file (TOML): methods, variants and seeds.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for runs, tables and figures.")] = Path(
        "runs/compare"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Number of runs at the same time.")] = 1,
    config: Override = None,
    files: Files = None,
) -> None:
    """Tune and run several methods and write tables and figures that compare them.

    Runs that have finished are not repeated.
    """
    given = given_keys(config or [], files or [])
    check_known(given)
    overrides = given.values
    read_file(experiment, overrides)  # before seconds of imports
    from hosl_flower.compare.compare import compare as run_comparison

    typer.echo(run_comparison(experiment, out, processes, overrides))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write an HTML report of one or several runs.

    The report is one file that opens without a network.
    """
    run_directories(runs)  # before the import of matplotlib
    from hosl_flower.report.page import write_page

    typer.echo(f"report: {write_page(runs, out)}")


def export(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    directory: Annotated[
        Path, typer.Argument(help="Directory to create. It must be new or empty.")
    ],
    what: Annotated[
        str, typer.Option(help="Part to export: model, adapters, client or server.")
    ] = "model",
    push: Annotated[str, typer.Option(help="Also upload to this Hugging Face repository.")] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private.")
    ] = False,
) -> None:
    """Export the trained model of a run to a directory, with a model card.

    You can export the merged model, the LoRA adapters, or one half of the model.
    """
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
    run: Annotated[
        str, typer.Argument(help="Directory of a finished run, or a model with --cut-layer.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 50,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature. 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    cut_layer: Annotated[
        int | None, typer.Option(help="Cut layer. The default is that of the run.")
    ] = None,
) -> None:
    """Continue a prompt with both halves of the model.

    The client's half computes activations for each token, the server's half chooses the next one.
    """
    check_source(run, cut_layer)  # before seconds of imports
    from hosl_flower.export import generate as generation

    choose = generation.chooser(temperature, top_p, seed)
    typer.echo(generation.continuation(run, prompt, max_new_tokens, choose, cut_layer))
