"""A group of run-config keys: the base class, and how a field's key follows from its name."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hosl_flower.config.text_values import checked_text


@dataclass(frozen=True)
class After:
    """Metadata of a field whose key is listed right after another one, not within its group."""

    key: str


def keys_begin_with(prefix: str) -> ConfigDict:
    """A group's model_config: field `learning_rate` is key `server-learning-rate`, and so on."""
    return ConfigDict(alias_generator=lambda name: prefix + name.replace("_", "-"))


class Group(BaseModel):
    """Keys that are used together. A field's alias is its key in Flower's run config."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # TOML has types: true is no number, "5" neither
        alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
        str_strip_whitespace=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="after")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        return checked_text(value) if isinstance(value, str) else value


def defaults_of(group: type[Group]) -> Any:
    """A field of RunConfig: a group, whose keys all have their defaults unless they are given."""
    return Field(default_factory=group, validate_default=True)
