"""What of a run is in a checkpoint, and a run that goes on from one.

All is on the server: its parameters and optimizer, its copy of what clients train with the
optimizer's state and the place in the ledger, the clients' places in their data, what has been
measured. Random numbers are functions of seed and step and have no state. Clients need not know:
they are brought up to date like any that was away. So a run that is stopped and resumed gives the
same numbers, bit for bit, as one that was not.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hosl_flower.config.rules import KEYS_FREE_TO_CHANGE
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.errors import CheckpointError, ConfigError
from hosl_flower.ledger.client_state import Snapshot
from hosl_flower.methods.method import Method
from hosl_flower.methods.registry import place_of
from hosl_flower.run.checkpoint import Checkpoint, found, read
from hosl_flower.run.resumable import check_files, check_links, check_values
from hosl_flower.server.history import History
from hosl_flower.server.participation import Participation
from hosl_flower.server.session import Session
from hosl_flower.server.traffic import Traffic
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.system.untrusted_files import read_json

log = logging.getLogger("hosl_flower")


def run_directory(config: RunConfig) -> Path:
    """Of the run that is resumed."""
    return Path(config.run.resume).expanduser().absolute()


def find(config: RunConfig) -> Checkpoint:
    """The checkpoint that a config wants to go on from: the latest that is whole, as are the files
    it is about. CheckpointError when there is none, ConfigError when the config is of another run
    or nothing is left to do."""
    directory = run_directory(config)
    checkpoint = _whole(directory)
    try:
        record = read_json(directory, directory / "config.json")["config"]
        if not isinstance(record, dict):
            raise TypeError("config is no object")
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}/config.json cannot be read ({error})") from error
    wanted = config.as_keys()
    # a rate that falls to zero at the end depends on where that is
    free = (
        KEYS_FREE_TO_CHANGE
        if config.learning_rate.schedule == "constant"
        else KEYS_FREE_TO_CHANGE - {"steps"}
    )
    # a key that is newer than the run was what it is by default
    before = {key: record.get(key, KEYS[key].field.default) for key in wanted}
    before["strategy"] = _same_way(str(before["strategy"]), config.strategy)
    differ = [
        f"{key} = {before[key]!r}, here {value!r}"
        for key, value in wanted.items()
        if key not in free and before[key] != value
    ]
    if differ:
        raise ConfigError(
            f"resume: {directory} is a run with {'; '.join(differ)}; only what does not change "
            "what is computed may be another"
        )
    if config.steps < checkpoint.step or (
        config.steps == checkpoint.step and not _lacks_files(config, checkpoint)
    ):
        raise ConfigError(
            f"resume: {directory} has a checkpoint of step {checkpoint.step}, and steps = "
            f"{config.steps}: nothing is left to do"
        )
    return checkpoint


def _same_way(before: str, now: str) -> str:
    """The method of a run as the config of today writes it, if it is the same method."""
    return now if place_of(before) == place_of(now) else before


def _whole(directory: Path) -> Checkpoint:
    """The latest checkpoint that can be used. CheckpointError of the latest if none can."""
    if directory.is_dir():
        check_links(directory)
    first: CheckpointError | None = None
    for step, path in sorted(found(directory), reverse=True):
        try:
            checkpoint = read(directory, step)
            check_values(path, checkpoint.values)
            check_files(directory, checkpoint)
        except CheckpointError as error:
            log.warning("the checkpoint of step %d cannot be used: %s", step, error)
            first = first or error
            continue
        return checkpoint
    if first:
        raise first
    return read(directory)  # says that there is none


def _lacks_files(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether a run came to its end at a checkpoint, and something of the end is not there."""
    directory, scored = run_directory(config), checkpoint.values["report"]["evaluations"]
    ended = bool(scored) and scored[-1]["step"] == checkpoint.step
    model = directory / "model"
    there = (directory / "results.json").is_file() and (model.is_dir() or not config.run.save_model)
    return ended and not there


def collect(
    step: int, session: Session, method: Method, traffic: Traffic, report: dict[str, Any]
) -> Checkpoint:
    """All of a run after a step."""
    history = session.history
    snapshot = history.state.snapshot()
    values = {
        "task": _task(session),
        "client": {
            "genesis": history.ledger.genesis,
            "position": snapshot.position,
            "digest": snapshot.digest,
            "updates": snapshot.updates,
            "private_optimizer": history.private_optimizer,
        },
        "session": session.participation.as_json(),
        "traffic": asdict(traffic),
        "report": report,
    }
    tensors = {
        "client.weights": snapshot.weights,
        "client.moments": snapshot.moments,
        **{f"server.{name}": tensor for name, tensor in _server_tensors(session.server).items()},
        **{f"method.{name}": tensor for name, tensor in method.save_state().items()},
    }
    if history.deltas.lost is not None:
        tensors["client.lost"] = history.deltas.lost
    return Checkpoint(step, values, tensors)


def restore(checkpoint: Checkpoint, session: Session, method: Method) -> None:
    """Bring a session that has just been opened to where the checkpoint is. CheckpointError when
    it is of another model."""
    values = checkpoint.values
    if values["task"] != _task(session):
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is of a run on {values['task']}, this one "
            f"would be on {_task(session)}: is the hub there as it was?"
        )
    try:
        _restore_history(session.history, values["client"], checkpoint)
        _load_server(session.server, _part(checkpoint.tensors, "server."))
        method.load_state(session, _part(checkpoint.tensors, "method."))
        session.participation = Participation.from_json(values["session"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit this run ({error})"
        ) from error
    session.done = checkpoint.step


def _task(session: Session) -> str:
    """Model and data that were really used, after any fallback."""
    spec = session.spec
    return f"{spec.model}, task {spec.task.name} of {spec.source or 'data of the clients'}"


def earlier_traffic(checkpoint: Checkpoint) -> Traffic:
    """What had been sent when the checkpoint was made."""
    values = dict(checkpoint.values["traffic"])
    try:
        return Traffic(**{**values, "tensor_peaks": tuple(values["tensor_peaks"])})
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step}, traffic: {error}; is it of another version?"
        ) from error


def _restore_history(history: History, place: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    if place["genesis"] != history.ledger.genesis:
        raise ValueError(
            f"its client submodel is {place['genesis']!r}, not {history.ledger.genesis!r}"
        )
    snapshot = Snapshot(
        place["position"],
        place["digest"],
        place["updates"],
        checkpoint.tensors["client.weights"],
        checkpoint.tensors["client.moments"],
    )
    history.state.restore(snapshot, checkpoint.step)
    history.ledger.skip(snapshot.position, snapshot.digest)
    history.private_optimizer = place["private_optimizer"]
    history.deltas.lost = checkpoint.tensors.get("client.lost")


def _server_tensors(server: ServerTrainer) -> dict[str, Tensor]:
    """Parameters and what the optimizer keeps of each."""
    found = {}
    for name, parameter in server.trained.items():
        found[f"parameter.{name}"] = parameter.detach().cpu()
        for key, value in server.optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = torch.as_tensor(value).cpu()
    return found


def _load_server(server: ServerTrainer, tensors: Mapping[str, Tensor]) -> None:
    rest = dict(tensors)
    own = server.optimizer.state_dict()
    kept: dict[int, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(server.trained.items()):
        value = rest.pop(f"parameter.{name}")
        if value.shape != parameter.shape:
            raise ValueError(f"{name} is {list(value.shape)}, not {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(value)
        mine = [key for key in rest if key.partition(".")[2] == name]
        if mine:
            kept[number] = {key.partition(".")[0]: rest.pop(key) for key in mine}
    if rest:
        raise ValueError(f"it has {sorted(rest)[0]}, which is not trained here")
    server.optimizer.load_state_dict({**own, "state": kept})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
