"""The cells of an experiment, checked before any is run."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hosl_flower.compare.experiment_file import Cell, Experiment, Keys, Tuning, read_file
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.methods.load import load_method, method_class


def read_experiment(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The file, its [config] with some keys overridden. ConfigError, with everything that is
    wrong, before any cell is run."""
    experiment = read_file(path, overrides)
    _check(experiment, path)
    return experiment


def _check(experiment: Experiment, path: Path) -> None:
    for role in ("control", "reference"):
        name = getattr(experiment, role)
        if name and name not in experiment.methods:
            raise ConfigError(
                f"{path}: {role} = {name!r} is none of the methods {', '.join(experiment.methods)}"
            )
    sizes = {
        m: len(list(grid(experiment, m))) for m, k in experiment.methods.items() if "tune" in k
    }
    if sizes and experiment.tuning is None:
        raise ConfigError(f"{path}: {', '.join(sizes)} have a tune grid; say how in [tuning]")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{method} {size}" for method, size in sizes.items())
        raise ConfigError(f"{path}: every tuned method must have as many settings: {listed}")
    if experiment.tuning is not None:
        _check_tuning(experiment.tuning, experiment, path)
    names = [cell.name for cell in cells(experiment, {})]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: a variant and a method together must make names of their own")
    for cell in itertools.chain(cells(experiment, {}), trials(experiment)):
        where = f"{path}, {cell.name}"
        load_method(parse_config({**cell.keys, "run-name": cell.name}, where))


def _check_tuning(tuning: Tuning, experiment: Experiment, path: Path) -> None:
    if tuning.seed in experiment.seeds:
        raise ConfigError(
            f"{path}: tuning.seed must be none of the seeds, it would favour that one"
        )
    if tuning.variant and tuning.variant not in experiment.variants:
        raise ConfigError(
            f"{path}: tuning.variant = {tuning.variant!r} is none of the variants "
            f"{', '.join(experiment.variants)}"
        )


def grid(experiment: Experiment, method: str) -> Iterator[Keys]:
    """The settings a method is tuned over; one empty one when it is not."""
    tune = experiment.methods[method].get("tune", {})
    if not isinstance(tune, dict) or not all(isinstance(v, list) and v for v in tune.values()):
        raise ConfigError(f"methods.{method}.tune: expected lists of values by run-config key")
    for values in itertools.product(*tune.values()):
        yield dict(zip(tune, values, strict=True))


def _keys(
    experiment: Experiment, variant: str, method: str, seed: int, own: Keys, trial: Keys
) -> Keys:
    """What is common to all methods is left out for one that does not look at it. trial: common to
    all trials."""
    given = {k: v for k, v in experiment.methods[method].items() if k != "tune"}
    common = {**experiment.config, **experiment.variants[variant], **trial}
    strategy = {**common, **given}.get("strategy")
    idle = method_class(str(strategy)).idle_keys() if strategy else []
    common = {key: value for key, value in common.items() if key not in idle}
    fixed = {"seed": seed, "save-model": False}
    return {"offline-fallback": False, **common, **given, **own, **fixed}


def cells(experiment: Experiment, chosen: Mapping[tuple[str, str], Keys]) -> list[Cell]:
    """Every run of the comparison, seed by seed. chosen: what tuning gave, by variant and method;
    a grid's first setting where there is none yet."""
    found = []
    for seed, variant, method in itertools.product(
        experiment.seeds, experiment.variants, experiment.methods
    ):
        tuned = _tuned_on(experiment, variant), method
        own = chosen.get(tuned) or next(grid(experiment, method))
        found.append(Cell(variant, method, seed, _keys(experiment, variant, method, seed, own, {})))
    return found


def _tuned_on(experiment: Experiment, variant: str) -> str:
    """The variant whose trials decide about this one."""
    return (experiment.tuning.variant if experiment.tuning else "") or variant


def trials(experiment: Experiment) -> list[Cell]:
    """Every run of the tuning."""
    found: list[Cell] = []
    tuning = experiment.tuning
    if tuning is None:
        return found
    variants = list(dict.fromkeys(_tuned_on(experiment, name) for name in experiment.variants))
    for variant, method in itertools.product(variants, experiment.methods):
        settings = list(grid(experiment, method))
        for number, own in enumerate(settings if len(settings) > 1 else []):
            steps = {"steps": tuning.steps, "eval-every": tuning.steps}
            own = {**own, **steps}
            keys = _keys(experiment, variant, method, tuning.seed, own, tuning.config)
            found.append(Cell(variant, f"{method}-tune{number}", tuning.seed, keys))
    return found
