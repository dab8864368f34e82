"""The run config: its keys in groups, and the flat form that Flower has of them.

Keys are flat kebab-case TOML scalars, as Flower's `[tool.flwr.app.config]` wants them. They
are validated once, here, before anything is loaded; inside, a RunConfig is trusted. A key is
declared in one place, as a field of RunConfig or of one of its groups.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from hosl_flower.config.groups.base import After, Group, defaults_of
from hosl_flower.config.groups.clients import ClientsKeys
from hosl_flower.config.groups.method import AggregationKeys, PaceKeys, PrivacyKeys, ZoKeys
from hosl_flower.config.groups.run import DeadlineKeys, EvaluationKeys, RunKeys
from hosl_flower.config.groups.stream import StreamKeys
from hosl_flower.config.groups.task import DataKeys, TaskKeys
from hosl_flower.config.groups.training import (
    ClientKeys,
    LearningRateKeys,
    LoraKeys,
    ServerKeys,
)
from hosl_flower.config.value_types import (
    Codec,
    Device,
    Dtype,
    LocalPath,
    Natural,
    Positive,
    Scalar,
    Threads,
    UpdateCodec,
)

# Where rounding and curvature weigh alike (docs/results/precision.json); elsewhere 1e-3.
_EPSILONS = {"bfloat16": 3e-3}


class RunConfig(Group):
    """A validated run configuration. Field `cut_layer` is key `cut-layer`, `lora.rank` `lora-rank`.

    The order of the fields is the order of the keys, but for those that say After.
    """

    strategy: str = Field(
        "hosl",
        pattern=r"^([\w.]+:\w+|[A-Za-z0-9_-]+)$",
        description="the method: hosl, ho-sfl, sign-vote, fedavg-zo, heron-sfl, split-zo, full-zo, "
        "frozen-client, split-fo, a name that another package registers, or 'module:class'",
    )
    model: LocalPath = Field(
        "facebook/opt-125m",
        min_length=1,
        description="hub id, local directory, or `random:<architecture>` for fresh weights",
    )
    cut_layer: Natural = Field(5, description="number of blocks the client holds")
    dtype: Dtype = Field(
        "float32",
        description="of client weights and activations; the server computes in float32. "
        "Updates of 16-bit weights are rounded at random, right on average",
    )
    device: Device = Field(
        "auto",
        description="auto takes a GPU where there is one; a node's own `device` overrides it",
    )
    threads: Threads = Field(
        0, description="CPU threads per process; 0 is all cores of the machine"
    )
    task: TaskKeys = defaults_of(TaskKeys)
    data: DataKeys = defaults_of(DataKeys)
    offline_fallback: bool = Field(
        True,
        description="without hub and cache: random weights and the bundled SMS data, with a banner",
    )
    clients: ClientsKeys = defaults_of(ClientsKeys)
    steps: Positive = Field(200, description="training steps in all")
    batch_size: Positive = Field(8, description="examples per step")
    evaluation: EvaluationKeys = defaults_of(EvaluationKeys)
    zo: ZoKeys = defaults_of(ZoKeys)
    pace: PaceKeys = defaults_of(PaceKeys)
    aggregation: AggregationKeys = defaults_of(AggregationKeys)
    privacy: PrivacyKeys = defaults_of(PrivacyKeys)
    client: ClientKeys = defaults_of(ClientKeys)
    server: ServerKeys = defaults_of(ServerKeys)
    learning_rate: LearningRateKeys = defaults_of(LearningRateKeys)
    lora: LoraKeys = defaults_of(LoraKeys)
    seed: Natural = Field(0, description="of data order, directions and fresh weights")
    run: RunKeys = defaults_of(RunKeys)
    deadlines: DeadlineKeys = defaults_of(DeadlineKeys)
    link: Literal["auto", "stream", "grid"] = Field(
        "auto",
        description="how requests travel: auto streams in simulation and where there is a "
        "stream-endpoint, else Flower messages (grid)",
    )
    codec: Codec = Field(
        "exact",
        description="of activations and cut gradients on the wire: exact, bf16, fp16, or int8 with "
        "a scale per token",
    )
    update_codec: UpdateCodec = Field(
        "exact",
        description="of the gradients or changes of weights that clients send (split FO with "
        "local-steps = 1, FedAvg-ZO): int8 with a scale per row, rounded at random, and "
        "changes of weights down in the same. Rows of zeros never travel",
    )
    stream: StreamKeys = defaults_of(StreamKeys)

    @field_validator("zo", mode="after")
    @classmethod
    def _settle_epsilon(cls, value: ZoKeys, info: ValidationInfo) -> ZoKeys:
        if value.epsilon:
            return value
        return value.model_copy(update={"epsilon": _EPSILONS.get(info.data.get("dtype", ""), 1e-3)})

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> "RunConfig":
        """The config of kebab-case keys, all of them known ones.

        Raises:
            ValidationError: pydantic's, whose places end with the key.
        """
        nested: dict[str, Any] = {}
        for key, value in keys.items():
            group = KEYS[key].group
            (nested.setdefault(group, {}) if group else nested)[key] = value
        return cls.model_validate(nested)

    def as_keys(self) -> dict[str, Scalar]:
        """All keys with their values, as Flower's run config."""
        return {name: attrgetter(key.path)(self) for name, key in KEYS.items()}

    def with_keys(self, changes: Mapping[str, Any]) -> "RunConfig":
        """The same config but for some keys."""
        return RunConfig.from_keys({**self.as_keys(), **changes})


@dataclass(frozen=True)
class Key:
    """A key of the run config.

    Attributes:
        name: in kebab case, as Flower has it.
        group: the alias of its group in RunConfig; empty where it is in none.
        path: of the attribute, from a RunConfig.
        field: its type, default and description.
    """

    name: str
    group: str
    path: str
    field: FieldInfo

    @property
    def after(self) -> str:
        """The key that it is listed after, where it says so."""
        return next((mark.key for mark in self.field.metadata if isinstance(mark, After)), "")


def _declared() -> Iterator[Key]:
    """The keys, group after group."""
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            for inner, own in kind.model_fields.items():
                yield Key(str(own.alias), str(field.alias), f"{name}.{inner}", own)
        else:
            yield Key(str(field.alias), "", name, field)


def _listed(declared: list[Key], after: str = "") -> Iterator[Key]:
    """The keys in their order: those after one, or those that say nothing, with their followers."""
    for key in declared:
        if key.after == after:
            yield key
            yield from _listed(declared, key.name)


KEYS = {key.name: key for key in _listed(list(_declared()))}
