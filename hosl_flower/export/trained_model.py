"""What a finished run trained, as two halves that can be loaded one at a time.

`model/` of a run directory is a merged model, or LoRA adapters beside a base model that is found
where the run found it (save-format).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hosl_flower.config.client_spec import server_lora
from hosl_flower.errors import ConfigError
from hosl_flower.export.finished_run import Finished, is_run, read_run
from hosl_flower.models.base_model import Base, check_cut, open_base
from hosl_flower.models.lora import Lora, load_adapters
from hosl_flower.models.split import load_client, load_server
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel
from hosl_flower.tensors.device import torch_dtype


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
        """The client's half. Raises ModelError."""
        submodel = load_client(self.base, self.cut, self.client_dtype, device, self.lora)
        if self.adapters is not None:
            load_adapters(self.adapters, submodel.canonical_parameters())
        return submodel

    def server(self, device: str = "cpu") -> ServerSubmodel:
        """The server's half, in float32. Raises ModelError."""
        submodel = load_server(self.base, self.cut, torch.float32, device, self.lora)
        if self.adapters is not None:
            load_adapters(self.adapters, submodel.canonical_parameters())
        return submodel


def trained_model(run: Finished, cut: int | None = None) -> Trained:
    """What a run trained, cut where it was or elsewhere. Raises ConfigError or ModelError."""
    config = run.config
    cut = config.cut_layer if cut is None else cut
    dtype = torch_dtype(config.dtype)
    if run.has_adapters:
        base = open_base(run.record.model_used)
        trained = Trained(base, cut, str(run.model), dtype, server_lora(config), run.model)
    else:
        # merged in float32: 16 bits would not hold what the adapters add
        dtype = torch.float32 if config.client.trainable == "lora" else dtype
        trained = Trained(open_base(str(run.model)), cut, str(run.model), dtype)
    check_cut(trained.base.config, cut)
    return trained


def open_trained(source: str, cut: int | None = None) -> Trained:
    """A run directory's model; or that of a model directory, hub id or `random:<architecture>`,
    for which the cut must be given. Raises ConfigError, CheckpointError or ModelError."""
    if is_run(source):
        return trained_model(read_run(Path(source).expanduser()), cut)
    base = open_base(source)
    if cut is None:
        raise ConfigError(
            f"{source} is a model and no run, which would know its cut: say --cut-layer, "
            f"0 to {base.blocks}"
        )
    check_cut(base.config, cut)
    return Trained(base, cut, source)
