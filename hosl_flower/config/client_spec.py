"""The part of a run's settings that travels to its clients."""

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hosl_flower.config.run_config import RunConfig
from hosl_flower.config.text_values import split_words
from hosl_flower.config.value_types import (
    Alpha,
    ClientGradient,
    ClientOptimizer,
    Codec,
    Device,
    Dtype,
    Labels,
    Length,
    Natural,
    NotNegative,
    Partitioner,
    Perturbation,
    Positive,
    Quantization,
    Threads,
    Trainable,
    UpdateCodec,
)
from hosl_flower.errors import ProtocolError
from hosl_flower.models.architectures import RANDOM
from hosl_flower.models.lora import Lora
from hosl_flower.tasks.task import Task


@dataclass(frozen=True)
class ClientSpec:
    """The agreement between server and clients of one run.

    run: names the run, so that a process that serves two never mixes them.
    source: of the data, see data.load_source. seed: see config. client_head: whether the client has
    an auxiliary head (models/auxiliary_head.py), which the method decides.
    """

    run: str
    model: str
    cut_layer: Natural
    dtype: Dtype
    codec: Codec
    update_codec: UpdateCodec
    device: Device
    threads: Threads
    client_trainable: Trainable
    client_quantization: Quantization
    client_head: bool
    client_gradient: ClientGradient
    client_optimizer: ClientOptimizer
    lora_rank: Positive
    lora_alpha: Alpha
    lora_targets: str
    perturbation: Perturbation
    labels: Labels
    task: Task
    source: str
    num_clients: Positive
    partitioner: Partitioner
    dirichlet_alpha: Alpha
    partition_column: str
    min_partition_size: Positive
    train_examples: Natural
    held_out_examples: Natural
    eval_examples: Natural
    batch_size: Positive
    eval_batch_size: Positive
    client_micro_batch: Natural
    image_size: Natural
    max_length: Length
    max_new_tokens: Positive
    seed: Natural
    activation_noise: NotNegative
    dp_noise: NotNegative
    dp_clip: NotNegative

    def to_json(self) -> str:
        """For the wire."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ClientSpec":
        """From the wire; ProtocolError when it is not one."""
        try:
            # not validate_json, which copies the whole text for every field it misses
            return _ADAPTER.validate_python(json.loads(text))
        except (ValueError, RecursionError) as error:
            if not isinstance(error, ValidationError):
                raise ProtocolError("client spec: it is not JSON") from error
            first = error.errors(include_url=False, include_input=False)[0]
            raise ProtocolError(f"client spec: {first['loc']}: {first['msg']}") from error

    @property
    def genesis(self) -> str:
        """What a ledger of this run starts from: all that decides the client submodel's bits."""
        random, lora = self.model.startswith(RANDOM), self.client_trainable == "lora"
        parts = [self.model, self.cut_layer, self.dtype, self.client_trainable, self.perturbation]
        parts += [self.client_optimizer, self.seed if random or lora else ""]
        if lora:
            parts += [self.lora_rank, self.lora_alpha, self.lora_targets]
        if self.client_quantization != "none":
            parts.append(self.client_quantization)
        if self.client_head:
            parts.append("head")
        if self.client_gradient != "backprop":
            parts.append(self.client_gradient)
        return "|".join(map(str, parts))

    @property
    def tells_labels(self) -> bool:
        """Whether a client says how many examples of each label it has, and what is wrong with
        one."""
        return self.labels == "server" and not self.dp_noise

    @property
    def lora(self) -> Lora | None:
        """The client's adapters, where it trains such."""
        if self.client_trainable != "lora":
            return None
        return Lora(self.lora_rank, self.lora_alpha, split_words(self.lora_targets), self.seed)


_ADAPTER = TypeAdapter(ClientSpec)


def client_spec(
    config: RunConfig, run: str, model: str, task: Task, source: str, client_head: bool = False
) -> ClientSpec:
    """Return the settings of a run that its clients get.

    Args:
        config: the run config.
        run: the name of the run.
        model: the model as it is used, which may be a fallback.
        task: the task as it is used.
        source: where its data come from.
        client_head: whether the client has an auxiliary head.
    """
    keys: dict[str, Any] = config.as_keys()
    settled: dict[str, Any] = {"run": run, "model": model, "task": task, "source": source}
    names = ClientSpec.__dataclass_fields__.keys() - settled.keys() - {"client_head"}
    values: dict[str, Any] = {name: keys[name.replace("_", "-")] for name in names}
    return ClientSpec(**settled, client_head=client_head, **values)


def server_lora(config: RunConfig) -> Lora | None:
    """The server's adapters, where it trains such."""
    if config.server.trainable != "lora":
        return None
    targets = split_words(config.lora.targets)
    return Lora(config.lora.rank, config.lora.alpha, targets, config.seed)
