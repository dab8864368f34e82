"""A SuperNode's own configuration, `flower-supernode --node-config`, and the rules it sets.

Which client the node is: partition-id (required), num-partitions. Its own, instead of the run's:
data-path, model-path, device, noise-secret; `{partition}` in data-path stands for the client's
number, where a node serves several. What a run may use of the device, on which only this
configuration decides, never a message: allow-data, allow-models, data-columns, stream-insecure.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hosl_flower.errors import ConfigError, RefusedError

PLACEHOLDER = "{partition}"  # in data-path: the number of the client it is for
# a segment begins with a letter or a digit, so that none is ".", ".." or "~"
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
_HUB_DATA = re.compile(rf"hub:({_SEGMENT}/{_SEGMENT})/{_SEGMENT}")
_HUB_MODEL = re.compile(rf"({_SEGMENT}/)?{_SEGMENT}")
_BUNDLED_DATA = re.compile(r"bundled:[a-z0-9_]+")
_TEXTS = (
    "data-path", "model-path", "device", "noise-secret", "allow-data", "allow-models",
    "data-columns",
)  # fmt: skip


@dataclass(frozen=True)
class NodeConfig:
    """The keys of a node's configuration that a client acts on.

    allow_data: sources that a run may name: patterns of hub data sets, in which * stands for
    anything, and absolute paths, which a run must name in the same letters. allow_models: patterns
    of hub models. data_columns: the only columns of its data that a run may use; none given, all.
    stream_insecure: whether a stream beyond this machine may go without TLS.
    """

    data_path: str = ""
    model_path: str = ""
    device: str = ""
    noise_secret: str = ""
    allow_data: tuple[str, ...] = ()
    allow_models: tuple[str, ...] = ()
    data_columns: tuple[str, ...] = ()
    stream_insecure: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "NodeConfig":
        """From Flower's node config, whose other keys are left alone. Raises ConfigError."""
        insecure = config.get("stream-insecure", False)
        if not isinstance(insecure, bool):
            raise ConfigError(
                f"--node-config: stream-insecure = {insecure!r}: expected true or false",
                public="stream-insecure in this node's --node-config is neither true nor false",
            )
        text = {key: str(config.get(key, "")) for key in _TEXTS}
        return cls(
            data_path=text["data-path"],
            model_path=text["model-path"],
            device=text["device"],
            noise_secret=text["noise-secret"],
            allow_data=_items(text["allow-data"]),
            allow_models=_items(text["allow-models"]),
            data_columns=_items(text["data-columns"]),
            stream_insecure=insecure,
        )

    def check(self, source: str, model: str) -> None:
        """RefusedError unless a run may have its data and its model opened here.

        source, model: of the run's ClientSpec. The node's own data-path and model-path take their
        place, and what comes with the package (bundled:, random:) is always allowed.
        """
        if not self.data_path:
            self._check_data(source)
        if not self.model_path:
            self._check_model(model)

    def _check_data(self, source: str) -> None:
        if not source or _BUNDLED_DATA.fullmatch(source):
            return
        hub = _HUB_DATA.fullmatch(source)
        if hub is None:
            if os.path.isabs(source) and source in self.allow_data:
                return
            raise RefusedError(
                f"this SuperNode opens no path that a run names, got data-path = {source!r}: set "
                "data-path in its --node-config to data of its own"
            )
        if not _matches(source, self.allow_data):
            raise RefusedError(
                f"this SuperNode does not allow the data set {source!r}: set data-path in its "
                f'--node-config to data of its own, or allow-data="{source}"'
            )
        _check_not_local("data set", hub[1])

    def _check_model(self, model: str) -> None:
        if model.startswith("random:"):
            return
        if not _HUB_MODEL.fullmatch(model):
            raise RefusedError(
                f"this SuperNode opens no path that a run names, got model = {model!r}: set "
                "model-path in its --node-config to a copy of its own"
            )
        if not _matches(model, self.allow_models):
            raise RefusedError(
                f"this SuperNode does not allow the model {model!r}: set model-path in its "
                f'--node-config to a copy of its own, or allow-models="{model}"'
            )
        _check_not_local("model", model)


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_not_local(kind: str, repository: str) -> None:
    """The hub's libraries take a directory of that name for the repository."""
    if os.path.lexists(repository):
        raise RefusedError(
            f"the {kind} {repository!r} is to come from the hub, and the directory in which this "
            "SuperNode was started has a file or folder of that name: start it elsewhere"
        )


def shared_between_partitions(data_path: str) -> bool:
    """Whether a node's data-path is the same data for every client the node serves."""
    return bool(data_path) and PLACEHOLDER not in data_path
