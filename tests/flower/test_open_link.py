"""link/choose.py: a stream does not leave the machine unencrypted by accident."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid
from specs import client_spec, history_for

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.flower.message_link import GridLink
from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.open_link import _bind, _certificates, check_stream, open_link
from hosl_flower.protocol.reply_limits import ReplyLimits


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"stream-endpoint": "server:8443"}, "would cross the network unencrypted"),
        ({"stream-endpoint": "10.0.0.7:8443"}, "would cross the network unencrypted"),
        ({"stream-endpoint": "server"}, "expected host:port"),
        ({"stream-endpoint": "server:99999", "stream-insecure": True}, "expected host:port"),
        ({"stream-endpoint": ":8443", "stream-insecure": True}, "expected host:port"),
        ({"stream-bind": "0.0.0.0:8443"}, "stream-bind = .* unencrypted"),
        (
            {"stream-endpoint": "127.0.0.1:8443", "stream-bind": "0.0.0.0:8443"},
            r"stream-bind = '0\.0\.0\.0:8443' is not this machine alone: .* unencrypted",
        ),
        ({"stream-endpoint": "localhost:8443", "stream-bind": "[::]:8443"}, "unencrypted"),
        ({"stream-endpoint": "localhost:8443", "stream-bind": "192.0.2.7:8443"}, "unencrypted"),
        ({"stream-bind": "server:0"}, "unencrypted"),
        ({"stream-bind": "8443"}, "stream-bind = '8443': expected host:port"),
        ({"stream-certificate": "a.pem"}, "stream-certificate and stream-key belong together"),
        ({"stream-key": "a.pem"}, "stream-certificate and stream-key belong together"),
    ],
)
def test_what_does_not_fit_is_refused(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_stream(parse_config(keys))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"stream-endpoint": "127.0.0.1:8443"},
        {"stream-endpoint": "[::1]:8443"},
        {"stream-endpoint": "localhost:8443"},
        {"stream-endpoint": "server:8443", "stream-insecure": True},
        {"stream-endpoint": "server:8443", "stream-certificate": "a", "stream-key": "b"},
        {"stream-endpoint": "server:8443", "link": "grid"},
        {"stream-bind": "0.0.0.0:8443", "link": "grid"},
        {"stream-endpoint": "127.0.0.1:8443", "stream-bind": "127.0.0.1:9443"},
        {"stream-endpoint": "server:8443", "stream-bind": "0.0.0.0:1", "stream-insecure": True},
        {
            "stream-endpoint": "server:8443",
            "stream-bind": "0.0.0.0:1",
            "stream-certificate": "a",
            "stream-key": "b",
        },
    ],
)
def test_what_fits_is_taken(keys):
    check_stream(parse_config(keys))


def test_host_and_port_follow_from_the_endpoint():
    assert _bind("") == "127.0.0.1:0"
    assert _bind("127.0.0.1:8443") == "127.0.0.1:8443"
    assert _bind("127.0.0.2:8443") == "127.0.0.2:8443"
    assert _bind("[::1]:8443") == "[::1]:8443"
    assert _bind("localhost:8443") == "127.0.0.1:8443"
    assert _bind("server:8443") == "[::]:8443"


def test_certificates_are_read_from_pem_files(tmp_path):
    files = {name: tmp_path / f"{name}.pem" for name in ("certificate", "key", "authority")}
    for name, path in files.items():
        path.write_text(f"-----BEGIN {name}-----\n")
    own = {f"stream-{name}": str(path) for name, path in files.items()}
    key, authority = _certificates(parse_config(own))
    assert key == (b"-----BEGIN key-----\n", b"-----BEGIN certificate-----\n")
    assert authority == "-----BEGIN authority-----\n"
    del own["stream-authority"]
    assert _certificates(parse_config(own))[1] == "-----BEGIN certificate-----\n"
    assert _certificates(parse_config({})) == (None, "")
    files["key"].write_text("no")
    with pytest.raises(ConfigError, match=r"stream-key = .*is no PEM file"):
        _certificates(parse_config(own))
    files["certificate"].unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        _certificates(parse_config({**own, "stream-key": str(files["authority"])}))


def test_a_method_that_needs_a_stream_does_not_start_without(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = LocalGrid({7: {"partition-id": 0}})
    spec = client_spec(num_clients=1)
    limits = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)
    with pytest.raises(ConfigError, match="local-steps keep weights on the clients"):
        open_link(grid, parse_config({}), spec, history_for(spec), limits, 1, needs_stream=True)


class Boasting(LocalGrid):
    """Of nodes that claim to be the simulation engine's."""

    def answer(self, message, config):
        record = ConfigRecord({**config, "simulated": True})
        return Message(RecordDict({"config": record}), reply_to=message)


def test_a_node_does_not_choose_the_link(monkeypatch):
    """What it says of a simulation is nothing to go by: the run would be served by whichever
    process of this machine dials first."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    spec = client_spec(num_clients=1)
    limits = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)
    grid = Boasting({7: {"partition-id": 0}})
    link = open_link(grid, parse_config({}), spec, history_for(spec), limits, 1)
    assert isinstance(link, GridLink)
    with pytest.raises(ConfigError, match="link = stream needs stream-endpoint"):
        open_link(grid, parse_config({"link": "stream"}), spec, history_for(spec), limits, 1)


@pytest.mark.parametrize(("reply", "nodes", "expected"), [(6.0, 50.0, 50.0), (80.0, 50.0, 80.0)])
def test_a_node_that_starts_has_the_longer_deadline(monkeypatch, reply, nodes, expected):
    seen = []

    class Noted(Nodes):
        def wait(self, seconds, required):
            seen.append((self.deadline, seconds))
            raise KeyboardInterrupt

    monkeypatch.setattr("hosl_flower.flower.open_link.Nodes", Noted)
    config = parse_config({"reply-deadline": reply, "nodes-deadline": nodes})
    spec = client_spec(num_clients=1)
    limits = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)
    with pytest.raises(KeyboardInterrupt):
        open_link(LocalGrid({}), config, spec, history_for(spec), limits, 1)
    assert seen == [(expected, nodes)]
