"""A finished run and the model it left behind, side by side.

`model/` of a run directory is a merged model, or LoRA adapters beside a base model that is found
where the run found it (save-format). Either can be loaded as the two halves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from hosl_flower.config.client_spec import server_lora
from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import CheckpointError, ConfigError
from hosl_flower.models.base_model import Base, check_cut, open_base
from hosl_flower.models.lora import Lora, load_adapters
from hosl_flower.models.split import load_client, load_server
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel
from hosl_flower.run.run_files import ConfigFile, Read, ResultsFile
from hosl_flower.system.untrusted_files import check_tree, parse_json, read_json, read_regular
from hosl_flower.tensors.device import torch_dtype


@dataclass(frozen=True)
class Finished:
    """A run directory. record: its config.json; results: its results.json."""

    directory: Path
    config: RunConfig
    record: ConfigFile
    results: ResultsFile

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
    """A finished run. Raises CheckpointError when the directory is none, has no model, or has one
    with links that lead out of it."""
    record = _read(directory, "config.json")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise CheckpointError(
            f"{directory} is no run directory: expected a config.json that a run wrote; runs are "
            "under output-dir, each in a directory of its own"
        )
    results = _read(directory, "results.json")
    if results is None:
        raise CheckpointError(
            f"{directory} is no finished run, it has no results.json: wait for its end, or let it "
            "go on with resume"
        )
    config = parse_config(record["config"], str(directory))
    run = Finished(
        directory,
        config,
        _typed(directory / "config.json", ConfigFile, record),
        _typed(directory / "results.json", ResultsFile, results),
    )
    if not run.model.is_dir():
        why = (
            "it was not saved to the end, its log says why: resume writes it if there is a "
            "checkpoint of the last step"
            if config.save_model
            else "train with save-model = true (here it was false)"
        )
        raise CheckpointError(f"{directory} has no saved model, expected {run.model}: {why}")
    check_tree(directory, run.model)
    return run


def _read(directory: Path, name: str) -> Any:
    """What a JSON file holds; None where there is no such file."""
    try:
        return read_json(directory, directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return None


_Model = TypeVar("_Model", bound=Read)


def _typed(path: Path, model: type[_Model], value: Any) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(
            f"{path}, {where}: {first['msg']}; expected a file that a run wrote"
        ) from error


def trained_model(run: Finished, cut: int | None = None) -> Trained:
    """What a run trained, cut where it was or elsewhere. Raises ConfigError or CheckpointError."""
    config = run.config
    cut = config.cut_layer if cut is None else cut
    dtype = torch_dtype(config.dtype)
    if run.has_adapters:
        base = open_base(run.record.model_used)
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
    if _is_run(path):
        return trained_model(read_run(path), cut)
    base = open_base(source)
    if cut is None:
        raise ConfigError(
            f"{source} is a model and no run, which would know its cut: say --cut-layer, "
            f"0 to {base.blocks}"
        )
    check_cut(base.config, cut)
    return Trained(base, cut, source)


def _is_run(path: Path) -> bool:
    """Whether a directory's config.json is of a run: a model's, which may be a link, has no key
    "config"."""
    try:
        return "config" in parse_json(read_regular(path / "config.json"))
    except (OSError, ValueError, TypeError, CheckpointError):
        return False
