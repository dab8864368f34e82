"""The streams that SuperNodes open to the ServerApp."""

from pydantic import Field

from hosl_flower.config.groups.base import Group, keys_begin_with
from hosl_flower.config.value_types import LocalPath


class StreamKeys(Group):
    """Where streams go, what they are encrypted with, and how long they last."""

    model_config = keys_begin_with("stream-")

    endpoint: str = Field(
        "", description="host:port of the ServerApp that SuperNodes dial; not for simulation"
    )
    bind: str = Field(
        "", description="host:port the ServerApp listens on; default: the endpoint's port"
    )
    certificate: LocalPath = Field(
        "", description="PEM file: certificate chain of the ServerApp's stream"
    )
    key: LocalPath = Field("", description="PEM file: its private key")
    authority: LocalPath = Field(
        "", description="PEM file: the CA clients trust; default: the certificate itself"
    )
    insecure: bool = Field(False, description="allow a stream without TLS beyond this machine")
    max_session_seconds: float = Field(
        0.0,
        alias="max-session-seconds",
        ge=0,
        description="a stream that has been open so long is closed between two exchanges, and its "
        "ClientApp called anew; 0 keeps it for the run",
    )
