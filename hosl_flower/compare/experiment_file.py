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

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hosl_flower.config.value_types import Scalar
from hosl_flower.errors import ConfigError

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


def read_file(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read the file, without a look at its cells.

    Args:
        path: of the file.
        overrides: keys of its [config] with other values.

    Raises:
        ConfigError: when it cannot be read or is no experiment.
    """
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return Experiment(**{**read, "config": {**read.get("config", {}), **(overrides or {})}})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read; expected an experiment in TOML") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError(f"{path} is no experiment:\n  " + "\n  ".join(lines)) from error
