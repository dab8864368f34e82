"""Surroundings that differ between machines: proxies, locale, home directory, umask."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import grpc
import httpx
import pytest
from huggingface_hub import constants

from hosl_flower import hub, processes, proxies
from hosl_flower.config import parse_config
from hosl_flower.errors import CheckpointError
from hosl_flower.link import dial
from hosl_flower.spec import resolve

NOWHERE = "http://127.0.0.1:9"  # the discard service's port, on which nobody listens


@pytest.fixture
def environment(monkeypatch):
    """set(name=value) of variables, where there are none of proxies."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def give(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.fixture
def healthy():
    """The port of a server on this machine that says it is well."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


class Running:
    """As subprocess.Popen sees a process that goes on."""

    def poll(self):
        return None


PROXIES = [
    {"http_proxy": NOWHERE, "https_proxy": NOWHERE},
    {"HTTP_PROXY": NOWHERE},
    {"all_proxy": "socks5://127.0.0.1:9"},
    {"ALL_PROXY": "socks4://127.0.0.1:9"},
    {"http_proxy": NOWHERE, "no_proxy": "10.0.0.1,fd00::/8"},
    {"http_proxy": "http://proxy:port"},
]


@pytest.mark.parametrize("variables", PROXIES)
def test_no_proxy_is_between_the_processes_of_a_simulation(
    environment, healthy, variables, monkeypatch, tmp_path
):
    environment(**variables)
    monkeypatch.setattr(processes, "_START_SECONDS", 3.0)
    (tmp_path / "log").touch()
    processes.wait_until_healthy(healthy, Running(), tmp_path / "log")
    for name, value in proxies.without_loopback(os.environ).items():
        environment(**{name: value})
    for name in variables:
        if name not in proxies.without_loopback(os.environ):
            monkeypatch.delenv(name)
    for host in ("127.0.0.1", "localhost"):  # as Flower's own processes connect
        assert httpx.get(f"http://{host}:{healthy}/", timeout=3).is_success


def test_the_entries_of_no_proxy_are_kept():
    given = {"NO_PROXY": "inside.org, 10.0.0.1,localhost,fd00::/8", "http_proxy": NOWHERE}
    result = proxies.without_loopback(given)
    assert result["no_proxy"] == "inside.org,10.0.0.1,localhost,127.0.0.1,::1"
    assert result["NO_PROXY"] == result["no_proxy"]
    assert result["http_proxy"] == NOWHERE
    assert proxies.LEFT_OUT not in result


def test_a_stream_on_this_machine_goes_through_no_proxy(monkeypatch):
    class Seen(Exception):
        pass

    def channel(endpoint, options):
        raise Seen(dict(options).get("grpc.enable_http_proxy", 1))

    monkeypatch.setattr(grpc, "insecure_channel", channel)
    found = {}
    for endpoint in ("127.0.0.1:1", "localhost:1", "[::1]:1", "example.org:1"):
        with pytest.raises(Seen) as caught:
            dial._Caller(dial.Invitation(endpoint, "", "", 1000, 1.0), None).connect()
        found[endpoint] = caught.value.args[0]
    assert found == {"127.0.0.1:1": 0, "localhost:1": 0, "[::1]:1": 0, "example.org:1": 1}


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The hub may be asked, and its caches are empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"https_proxy": "http://me:secret@127.0.0.1:9"}, "https_proxy = http://127.0.0.1:9"),
        ({"ALL_PROXY": NOWHERE}, f"all_proxy = {NOWHERE}"),
        ({"all_proxy": "socks4://127.0.0.1:9"}, "all_proxy = socks4://127.0.0.1:9 cannot be used"),
        ({"https_proxy": NOWHERE, "no_proxy": "fd00::/8"}, "no_proxy has 'fd00::/8'"),
        ({proxies.LEFT_OUT: "all_proxy = x cannot be used"}, "all_proxy = x cannot be used"),
    ],
)
def test_a_proxy_that_keeps_the_hub_away_is_named(environment, online, variables, named):
    environment(**variables)
    settled = resolve(parse_config({"model": "facebook/opt-125m", "task": "sst2"}), "run")
    first = settled.notice.splitlines()[0]
    assert first.startswith("NOT A RESULT: the Hugging Face hub cannot be reached (proxy: ")
    assert named in first
    assert "secret" not in settled.notice
    keys = {"model": "facebook/opt-125m", "offline-fallback": False}
    with pytest.raises(CheckpointError, match="cannot be reached \\(proxy: ") as caught:
        resolve(parse_config(keys), "run")
    assert named in str(caught.value)


def test_where_no_proxy_applies_none_is_named(environment, online):
    environment(https_proxy=NOWHERE, no_proxy="huggingface.co")
    assert hub.proxy_note() == ""
    environment(all_proxy="socks4://127.0.0.1:9", no_proxy="*")
    assert hub.proxy_note() == ""
