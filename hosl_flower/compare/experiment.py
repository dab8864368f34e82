"""An experiment: methods x variants x seeds of one comparison, read from a TOML file.

    seeds = [0, 1, 2]
    control = "frozen"             # gap closed: 0 is this method,
    reference = "split-fo"         # 1 is this one
    target-accuracy = 0.75         # for the columns "steps / bytes / seconds to target"; of F1
                                   # where answers are generated

    [config]                       # run-config keys of every cell
    [variants.cut2]                # keys of one column of cells: cuts, partitions, tasks ...
    [methods.ho-sfl]               # keys of one method
    tune = { client-learning-rate = [1e-4, 1e-3, 1e-2] }
    [tuning]                       # how the best of a grid is found: on a seed of its own, so on
    seed = 100                     # another data order and, with held-out-examples, on another
    steps = 300                    # draw of them; a held-out part of the source's own is the same
    config = { eval-examples = 1000 }  # keys of all trials
    variant = "cut2"               # tuned on this variant alone, the others take what it found

Every method that is tuned is tuned on the same number of settings. A key of [config] or of a
variant that a method does not look at is left out for that method. offline-fallback is false
unless a key says otherwise: random weights are no results. Paths in the file are relative
to the directory the command is run in, as in a run config.
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import Scalar
from hosl_flower.errors import ConfigError
from hosl_flower.methods.load import load_method, method_class

Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Keys = dict[str, Any]
_STRICT = ConfigDict(
    extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-")
)


class Tuning(BaseModel):
    """seed: none of the experiment's. steps: of a trial; the budget is the same for all.
    config: run-config keys of every trial, over those of the experiment. variant: the only one
    that is tuned on, for all of them; empty: each is tuned on its own."""

    model_config = _STRICT
    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    config: Keys = {}
    variant: str = ""


class Experiment(BaseModel):
    """The file, checked. variants and methods: name -> run-config keys."""

    model_config = _STRICT
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    control: str = ""
    reference: str = ""
    target_accuracy: float = Field(0.0, ge=0, le=1)
    flower_app: str = ""
    config: Keys = {}
    variants: dict[Name, Keys] = Field({"": {}}, min_length=1)
    methods: dict[Name, Keys] = Field(min_length=1)
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Cell:
    """One run. keys: its whole run config but for run-name and output-dir."""

    variant: str
    method: str
    seed: int
    keys: Mapping[str, Scalar]

    @property
    def name(self) -> str:
        """Of its run directory."""
        return "-".join(filter(None, (self.variant, self.method, f"seed{self.seed}")))


def read_experiment(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The file, its [config] with some keys overridden. ConfigError, with everything that is
    wrong, before any cell is run."""
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        experiment = Experiment(
            **{**read, "config": {**read.get("config", {}), **(overrides or {})}}
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read; expected an experiment in TOML") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError(f"{path} is no experiment:\n  " + "\n  ".join(lines)) from error
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
