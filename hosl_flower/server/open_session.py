"""Opening a run on the server: everything settled, checked and loaded before a client is asked."""

import torch

from hosl_flower.config.client_spec import server_lora
from hosl_flower.config.resolve import Resolved, banner, resolve
from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.encoders.make import make_inputs
from hosl_flower.errors import ConfigError
from hosl_flower.ledger.new_state import load_client_half, new_state
from hosl_flower.models.base_model import check_cut, open_base
from hosl_flower.models.checkpoints.adapters import AdaptedWeights
from hosl_flower.models.class_head import class_names, with_classes
from hosl_flower.models.split import load_server
from hosl_flower.server.history import History
from hosl_flower.server.reference import reference_of
from hosl_flower.server.session import Session, log
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tensors.device import pick_device, use_threads


def open_session(
    config: RunConfig, run: str, required_clients: int, client_head: bool = False
) -> Session:
    """Settle, check and load everything on the server's side; raises a HoslError before any
    client is asked for anything. required_clients: without so many the run does not start."""
    use_threads(config.threads)
    resolved: Resolved = resolve(config, run, client_head)
    spec = resolved.spec
    for line in banner(resolved.notice):  # the first lines of the log: not to be missed
        log.warning(line)
    device = pick_device(config.device)
    base = open_base(spec.model, spec.seed)
    check_cut(base.config, spec.cut_layer)
    encoder = make_inputs(spec, spec.model, base.config)
    encoder.check(base.config)
    task = spec.task
    base, _ = with_classes(base, class_names(task), spec.seed, task, config.task.fresh_head)
    submodel = load_server(base, spec.cut_layer, torch.float32, device, server_lora(config))
    server = ServerTrainer(
        submodel,
        encoder.answers,
        config.server.optimizer,
        config.server.learning_rate,
        config.server.trainable,
        own_head=config.task.labels == "server",
        gradient_clip=config.server.gradient_clip,
    )
    if config.run.save_format == "adapters" and base.family.classes:
        raise ConfigError("save-format = adapters cannot hold the head of a classifier; use merged")
    if config.run.save_format == "adapters" and isinstance(base.source, AdaptedWeights):
        raise ConfigError(
            f"save-format = adapters needs a base model of its own, {spec.model} is adapters over "
            "another; use merged"
        )
    if config.run.save_format == "adapters" and not base.pretrained:
        raise ConfigError(
            f"save-format = adapters needs a base model that can be loaded again, {spec.model} has "
            "random weights; use merged"
        )
    client = load_client_half(base, spec, encoder.answers)
    reference = reference_of(client, submodel, encoder, base.config)
    history = History(new_state(client, spec), spec.genesis)
    del client  # but for its trainable parameters
    if not history.state.elements:
        raise ConfigError(
            f"client-trainable = {config.client.trainable} leaves the client nothing to train at "
            f"cut-layer = {spec.cut_layer}"
        )
    return Session(
        config, spec, resolved.notice, base, encoder, server, history, required_clients, reference
    )
