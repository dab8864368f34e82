"""Commands that take a Flower app directory: new, run, simulate and plan."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.config.app_config import key_value, read_app_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.infer_task import check_data_path
from hosl_flower.errors import ConfigError
from hosl_flower.flower.app_template import new_app, template_names
from hosl_flower.models.before_loading import check_model

App = Annotated[Path, typer.Argument(help="a Flower app directory, such as `new` creates")]
Override = Annotated[
    list[str] | None, typer.Option("-c", "--config", help="key=value, may be repeated")
]


def new(
    directory: Annotated[Path, typer.Argument(help="the app to create; must be new or empty")],
    template: Annotated[
        str, typer.Option("--from", help=f"one of {', '.join(template_names())}")
    ] = "quickstart",
) -> None:
    """Create a Flower app that lists every run-config key, for run, simulate, plan and flwr run."""
    typer.echo(f"created: {new_app(directory, template)}")


def run(app: App, config: Override = None) -> None:
    """Train in this process, without Flower: same config, same numbers, no network."""
    checked = _checked(app, config)
    from hosl_flower.methods.load import load_method
    from hosl_flower.run.run_log import log_to_stderr
    from hosl_flower.run.start import run_in_process

    log_to_stderr()
    run_in_process(load_method(checked))


def simulate(
    app: App,
    config: Override = None,
    federation: Annotated[
        str, typer.Option(help="passed on as --federation-config, e.g. 'num-supernodes=4'")
    ] = "",
) -> None:
    """`flwr run` with a SuperLink of its own: fails when the run failed, leaves nothing behind."""
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
    typer.echo(f"results: {results}")


def plan(
    app: App,
    config: Override = None,
    client_memory: Annotated[str, typer.Option(help="of a device, e.g. 1GB")] = "",
    uplink: Annotated[str, typer.Option(help="of a device, e.g. 10Mbps")] = "",
    downlink: Annotated[str, typer.Option(help="of a device, e.g. 50Mbps")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """What a run will need of a device: memory, bytes and seconds, from a few steps here."""
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


def _checked(app: Path, overrides: list[str] | None) -> RunConfig:
    """The config of an app, and what can be told of its model and data before seconds of
    imports."""
    config = read_app_config(app, overrides or [])
    check_model(config.model, config.cut_layer)
    check_data_path(config)
    return config
