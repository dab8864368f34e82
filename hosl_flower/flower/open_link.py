"""Which link a run uses, and whether its stream is allowed to be open as it is configured."""

from pathlib import Path

from flwr.serverapp import Grid

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.flower.message_link import GridLink
from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.stream.link import StreamLink
from hosl_flower.flower.superlink import SuperLink
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.history import History
from hosl_flower.server.link import Link
from hosl_flower.system.proxies import is_loopback


def open_link(
    grid: Grid,
    config: RunConfig,
    spec: ClientSpec,
    history: History,
    limits: ReplyLimits,
    required_clients: int,
    needs_stream: bool = False,
) -> Link:
    """Find the nodes, then talk to them as the config says. needs_stream: clients hold what a
    process called anew would not have.

    link = auto is a stream in simulation, and on real SuperNodes where there is a
    stream-endpoint; Flower messages otherwise. Which of both it is does not depend on anything
    a node says. Raises ConfigError for a stream that would cross a network unencrypted without
    that being asked for, and for a method that needs a stream where there is none.
    """
    check_stream(config)
    superlink = SuperLink(grid, config.deadlines.reply)
    # a node's first answer is when its process has loaded everything, which is no exchange
    starting = max(config.deadlines.reply, config.deadlines.nodes)
    nodes = Nodes(superlink, config.clients.count, config.clients.per_node, starting)
    nodes.wait(config.deadlines.nodes, required_clients)
    stream = config.link == "stream" or (
        config.link == "auto" and (nodes.simulated or bool(config.stream.endpoint))
    )
    if not stream and needs_stream:
        raise ConfigError(
            "this method's local-steps keep weights on the clients, which Flower messages do not: "
            "set stream-endpoint, the host:port of this ServerApp that SuperNodes can dial, or "
            "local-steps = 1"
        )
    if not stream:
        return GridLink(superlink, spec, history, limits, config.deadlines.reply, nodes)
    if not nodes.simulated and not config.stream.endpoint:
        raise ConfigError(
            "link = stream needs stream-endpoint, the host:port of this ServerApp that "
            "SuperNodes can dial"
        )
    certificate, authority = _certificates(config)
    bind = config.stream.bind or _bind(config.stream.endpoint)
    return StreamLink(
        superlink,
        spec,
        history,
        limits,
        config.deadlines.reply,
        nodes,
        endpoint=config.stream.endpoint,
        bind=bind,
        certificate=certificate,
        authority=authority,
        longest=config.stream.max_session_seconds,
        indispensable=required_clients == config.clients.count,
    )


def check_stream(config: RunConfig) -> None:
    """ConfigError for stream keys that do not fit together."""
    if bool(config.stream.certificate) != bool(config.stream.key):
        raise ConfigError("stream-certificate and stream-key belong together: set both or none")
    if config.link == "grid":
        return
    for key, value in (
        ("stream-endpoint", config.stream.endpoint),
        ("stream-bind", config.stream.bind),
    ):
        if not value:
            continue
        host = _host_and_port(key, value)[0]
        if not (config.stream.certificate or config.stream.insecure or is_loopback(host)):
            raise ConfigError(
                f"{key} = {value!r} is not this machine alone: activations and labels would cross "
                "the network unencrypted. Set stream-certificate and stream-key, or "
                "stream-insecure = true if that network is trusted"
            )


def _certificates(config: RunConfig) -> tuple[tuple[bytes, bytes] | None, str]:
    """((key, certificate chain), the authority that clients trust), PEM."""
    if not config.stream.certificate:
        return None, ""
    key = _pem("stream-key", config.stream.key)
    chain = _pem("stream-certificate", config.stream.certificate)
    authority = chain
    if config.stream.authority:
        authority = _pem("stream-authority", config.stream.authority)
    return (key, chain), authority.decode("ascii", errors="replace")


def _pem(name: str, path: str) -> bytes:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} = {path!r} cannot be read: {error.strerror}") from error
    if b"-----BEGIN" not in content:
        raise ConfigError(f"{name} = {path!r} is no PEM file")
    return content


def _bind(endpoint: str) -> str:
    """Where to listen for an endpoint: on every interface, or on this machine only."""
    if not endpoint:
        return "127.0.0.1:0"
    host, port = _host_and_port("stream-endpoint", endpoint)
    if not is_loopback(host):
        return f"[::]:{port}"
    own = "127.0.0.1" if host == "localhost" else host
    return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


def _host_and_port(name: str, value: str) -> tuple[str, int]:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{name} = {value!r}: expected host:port")
    return host.strip("[]"), int(port)
