"""A finished run and the model it left behind, side by side.

`model/` of a run directory is a merged model, or LoRA adapters beside a base model that is found
where the run found it (save-format). Either can be loaded as the two halves.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hosl_flower.config import RunConfig, parse_config
from hosl_flower.errors import CheckpointError, ConfigError
from hosl_flower.lora import Lora, load_adapters
from hosl_flower.spec import server_lora, torch_dtype
from hosl_flower.split import (
    Base,
    ClientSubmodel,
    ServerSubmodel,
    check_cut,
    load_client,
    load_server,
    open_base,
)


@dataclass(frozen=True)
class Finished:
    """A run directory. record: its config.json; results: its results.json."""

    directory: Path
    config: RunConfig
    record: dict[str, Any]
    results: dict[str, Any]

    @property
    def model(self) -> Path:
        """Where it saved its model."""
        return self.directory / "model"

    @property
    def has_adapters(self) -> bool:
        """Whether what it saved are adapters."""
        return (self.model / "adapter_config.json").is_file()


@dataclass(frozen=True)
class Trained:
    """A model whose halves can be loaded one at a time, each reading only its own tensors.

    client_dtype: what the client held its weights in. adapters: a directory of them, and `lora`
    what they are like; None where they are in the weights already. tokenizer: of which model.
    """

    base: Base
    cut: int
    tokenizer: str
    client_dtype: torch.dtype = torch.float32
    lora: Lora | None = None
    adapters: Path | None = None

    def client(self, device: str = "cpu") -> ClientSubmodel:
        """The client's half. Raises CheckpointError."""
        submodel = load_client(self.base, self.cut, self.client_dtype, device, self.lora)
        if self.adapters is not None:
            load_adapters(self.adapters, submodel.canonical_parameters())
        return submodel

    def server(self, device: str = "cpu") -> ServerSubmodel:
        """The server's half, in float32. Raises CheckpointError."""
        submodel = load_server(self.base, self.cut, torch.float32, device, self.lora)
        if self.adapters is not None:
            load_adapters(self.adapters, submodel.canonical_parameters())
        return submodel


def read_run(directory: Path) -> Finished:
    """A finished run. Raises CheckpointError when the directory is none or has no model."""
    record = _read(directory / "config.json")
    if record is None or not isinstance(record.get("config"), dict):
        raise CheckpointError(
            f"{directory} is no run directory: expected a config.json that a run wrote; runs are "
            "under output-dir, each in a directory of its own"
        )
    results = _read(directory / "results.json")
    if results is None:
        raise CheckpointError(
            f"{directory} is no finished run, it has no results.json: wait for its end, or let it "
            "go on with resume"
        )
    run = Finished(directory, parse_config(record["config"], str(directory)), record, results)
    if not run.model.is_dir():
        raise CheckpointError(
            f"{directory} has no saved model, expected {run.model}: train with save-model = true "
            f"(here it was {str(run.config.save_model).lower()})"
        )
    return run


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object; expected a file that a run wrote")
    return value


def trained_model(run: Finished, cut: int | None = None) -> Trained:
    """What a run trained, cut where it was or elsewhere. Raises ConfigError or CheckpointError."""
    config = run.config
    cut = config.cut_layer if cut is None else cut
    dtype = torch_dtype(config.dtype)
    if run.has_adapters:
        base = open_base(run.record["model_used"])
        trained = Trained(base, cut, str(run.model), dtype, server_lora(config), run.model)
    else:
        # merged in float32: 16 bits would not hold what the adapters add
        dtype = torch.float32 if config.client_trainable == "lora" else dtype
        trained = Trained(open_base(str(run.model)), cut, str(run.model), dtype)
    check_cut(trained.base.config, cut)
    return trained


def open_trained(source: str, cut: int | None = None) -> Trained:
    """A run directory's model; or that of a model directory, hub id or `random:<architecture>`,
    for which the cut must be given. Raises ConfigError or CheckpointError."""
    path = Path(source).expanduser()
    if "config" in (_read(path / "config.json") or {}):  # a model's has no such key
        return trained_model(read_run(path), cut)
    base = open_base(source)
    if cut is None:
        raise ConfigError(
            f"{source} is a model and no run, which would know its cut: say --cut-layer, "
            f"0 to {base.blocks}"
        )
    check_cut(base.config, cut)
    return Trained(base, cut, source)
