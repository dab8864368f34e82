"""The command line: run a simulation in this process, or through a private Flower SuperLink."""

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hosl_flower import __version__
from hosl_flower.compare.experiment_file import read_file
from hosl_flower.config.parse import help_table, parse_config
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.data.infer_task import check_data_path
from hosl_flower.errors import ConfigError, HoslError, first_line
from hosl_flower.export.finished_run import check_source, read_run
from hosl_flower.flower.app_template import new_app, template_names
from hosl_flower.models.before_loading import check_model
from hosl_flower.models.checkpoints import hub
from hosl_flower.report.runs import run_directories

# read by OpenMP when torch is loaded: threads that wait must not spin on each other's cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

App = Annotated[Path, typer.Argument(help="a Flower app directory, such as `new` creates")]
Override = Annotated[
    list[str] | None, typer.Option("-c", "--config", help="key=value, may be repeated")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hosl-flower {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Split federated fine-tuning on Flower."""


@cli.command()
def new(
    directory: Annotated[Path, typer.Argument(help="the app to create; must be new or empty")],
    template: Annotated[
        str, typer.Option("--from", help=f"one of {', '.join(template_names())}")
    ] = "quickstart",
) -> None:
    """Create a Flower app that lists every run-config key, for run, simulate, plan and flwr run."""
    try:
        typer.echo(f"created: {new_app(directory, template)}")
    except HoslError as error:
        _fail(error)


@cli.command()
def run(app: App, config: Override = None) -> None:
    """Train in this process, without Flower: same config, same numbers, no network."""
    try:
        checked = _checked(app, config)
        from hosl_flower.methods.load import load_method
        from hosl_flower.run.run_log import log_to_stderr
        from hosl_flower.run.start import run_in_process

        log_to_stderr()
        run_in_process(load_method(checked))
    except HoslError as error:
        _fail(error)


@cli.command()
def simulate(
    app: App,
    config: Override = None,
    federation: Annotated[
        str, typer.Option(help="passed on as --federation-config, e.g. 'num-supernodes=4'")
    ] = "",
) -> None:
    """`flwr run` with a SuperLink of its own: fails when the run failed, leaves nothing behind."""
    try:
        overrides = dict(map(key_value, config or []))
        checked = _checked(app, config)
        from hosl_flower.methods.load import load_method

        load_method(checked)  # what it refuses, it refuses before anything is started
        keys = checked.as_keys()
        overrides |= {key: keys[key] for key in ("run-name", "resume") if keys[key]}
        from hosl_flower.flower.local_run import run_flower_app
        from hosl_flower.system.directories import check_writable

        check_writable(Path(checked.run.output_dir).expanduser().absolute(), "output-dir")
        results = run_flower_app(app, overrides, federation, Path(checked.run.output_dir))
    except HoslError as error:
        _fail(error)
    typer.echo(f"results: {results}")


@cli.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="a TOML file: methods x variants x seeds")],
    out: Annotated[Path, typer.Option(help="where runs, tables and figures go")] = Path(
        "runs/compare"
    ),
    processes: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    config: Override = None,
) -> None:
    """Tune, run and tabulate methods against each other; finished runs are not run again."""
    try:
        overrides = dict(map(key_value, config or []))
        read_file(experiment, overrides)  # before seconds of imports
        from hosl_flower.compare.compare import compare as run_comparison

        typer.echo(run_comparison(experiment, out, processes, overrides))
    except HoslError as error:
        _fail(error)


@cli.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, e.g. runs/20261124-190634")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
) -> None:
    """One HTML page of one or several runs, side by side: opens from disk, without a network."""
    try:
        run_directories(runs)  # before the import of matplotlib
        from hosl_flower.report.page import write_page

        typer.echo(f"report: {write_page(runs, out)}")
    except HoslError as error:
        _fail(error)


@cli.command()
def plan(
    app: App,
    config: Override = None,
    client_memory: Annotated[str, typer.Option(help="of a device, e.g. 1GB")] = "",
    uplink: Annotated[str, typer.Option(help="of a device, e.g. 10Mbps")] = "",
    downlink: Annotated[str, typer.Option(help="of a device, e.g. 50Mbps")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """What a run will need of a device: memory, bytes and seconds, from a few steps here."""
    try:
        checked = _checked(app, config)
        from hosl_flower.run import plan as planning
        from hosl_flower.run.plan_table import plan_table
        from hosl_flower.run.run_log import log_to_stderr

        log_to_stderr()
        memory = planning.parse_bytes("--client-memory", client_memory)
        rates = planning.parse_rate("--uplink", uplink), planning.parse_rate("--downlink", downlink)
        found = planning.plan(checked)
        both = {**found.as_json(), "run_seconds": found.run_seconds(*rates)}
        typer.echo(json.dumps(both) if as_json else plan_table(found, memory, *rates))
        if found.client_bytes > memory:
            raise ConfigError(
                f"a client needs about {found.client_bytes / 2**20:.0f} MiB, --client-memory is "
                f"{memory / 2**20:.0f} MiB: lower cut-layer, client-micro-batch or max-length, "
                "or use dtype = bfloat16"
            )
    except HoslError as error:
        _fail(error)


@cli.command()
def export(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    directory: Annotated[Path, typer.Argument(help="what to make; must not be there yet")],
    what: Annotated[str, typer.Option(help="model, adapters, client or server")] = "model",
    push: Annotated[str, typer.Option(help="and upload it to this hub repository")] = "",
    private: Annotated[bool, typer.Option("--private", help="make that repository so")] = False,
) -> None:
    """A trained model as a directory of its own: merged, adapters, or one half; with a card."""
    try:
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
    except HoslError as error:
        _fail(error)


@cli.command()
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
    try:
        check_source(run, cut_layer)  # before seconds of imports
        from hosl_flower.export import generate as generation

        choose = generation.chooser(temperature, top_p, seed)
        typer.echo(generation.continuation(run, prompt, max_new_tokens, choose, cut_layer))
    except HoslError as error:
        _fail(error)


@cli.command()
def keys() -> None:
    """The table of run-config keys, as Markdown."""
    typer.echo(help_table())


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


def _checked(app: Path, overrides: list[str] | None) -> RunConfig:
    """The config of an app, and what can be told of its model and data before seconds of
    imports."""
    config = read_app_config(app, overrides or [])
    check_model(config.model, config.cut_layer)
    check_data_path(config)
    return config


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


def _fail(error: HoslError) -> None:
    Console(stderr=True, width=10_000 if not os.isatty(2) else None).print(
        f"error: {error}", style="bold red", markup=False, highlight=False
    )
    raise typer.Exit(1)
