"""Commands that take a Flower app directory: new, run, simulate and plan."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.config.app_config import given_keys, read_app_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.infer_task import check_data_path
from hosl_flower.errors import ConfigError
from hosl_flower.flower.app_template import new_app, template_names
from hosl_flower.models.before_loading import check_model

App = Annotated[Path, typer.Argument(help="Directory of a Flower app, such as `new` creates.")]
Override = Annotated[
    list[str] | None,
    typer.Option("-c", metavar="key=value", help="Set a run-config key. You can repeat -c."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read run-config keys from a TOML file. -c overrides it. You can repeat --config.",
    ),
]


def new(
    directory: Annotated[
        Path, typer.Argument(help="Directory of the new app. It must be new or empty.")
    ],
    template: Annotated[
        str, typer.Option("--from", help=f"Template: {', '.join(template_names())}.")
    ] = "quickstart",
) -> None:
    """Create a Flower app that lists every run-config key."""
    typer.echo(f"created: {new_app(directory, template)}")


def run(app: App, config: Override = None, files: Files = None) -> None:
    """Train in this process, without Flower.

    The settings and the numbers are those of a run with Flower, and no network is used.
    """
    checked = _checked(app, config, files)
    from hosl_flower.methods.load import load_method
    from hosl_flower.run.run_log import log_to_stderr
    from hosl_flower.run.start import run_in_process

    log_to_stderr()
    run_in_process(load_method(checked))


def simulate(
    app: App,
    config: Override = None,
    files: Files = None,
    federation: Annotated[
        str,
        typer.Option(help="Settings for --federation-config of flwr, such as 'num-supernodes=4'."),
    ] = "",
) -> None:
    """Run the app in a temporary local SuperLink.

    The command exits with an error if the run fails, and stops all processes that it started.
    """
    overrides = given_keys(config or [], files or []).values
    checked = _checked(app, config, files)
    from hosl_flower.methods.load import load_method

    load_method(checked)  # what it refuses, it refuses before anything is started
    keys = checked.as_keys()
    overrides |= {key: keys[key] for key in ("run-name", "resume") if keys[key]}
    from hosl_flower.flower.local_run import run_flower_app
    from hosl_flower.system.directories import check_writable

    check_writable(Path(checked.run.output_dir).expanduser().absolute(), "output-dir")
    results = run_flower_app(app, overrides, federation, Path(checked.run.output_dir))
    typer.echo(f"results: {results}")


def plan(
    app: App,
    config: Override = None,
    files: Files = None,
    client_memory: Annotated[str, typer.Option(help="RAM of a client device, such as 1GB.")] = "",
    uplink: Annotated[
        str, typer.Option(help="Upload rate of a client device, such as 10Mbps.")
    ] = "",
    downlink: Annotated[
        str, typer.Option(help="Download rate of a client device, such as 50Mbps.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate the memory, traffic and time that a run needs on a client device.

    The estimate comes from a few steps on this machine.
    """
    checked = _checked(app, config, files)
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


def _checked(app: Path, overrides: list[str] | None, files: list[Path] | None) -> RunConfig:
    """The config of an app, with model and data checked as far as that is possible at once."""
    config = read_app_config(app, overrides or [], files or [])
    check_model(config.model, config.cut_layer)
    check_data_path(config)
    return config
