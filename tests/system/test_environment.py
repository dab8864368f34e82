"""Surroundings that differ between machines: proxies, locale, home directory, umask."""

import ast
import contextlib
import os
import signal
import stat
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import grpc
import httpx
import pytest
import torch
from huggingface_hub import constants
from runs import run_factory

from hosl_flower.config.parse import parse_config
from hosl_flower.config.resolve import resolve
from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.flower import local_run as local_flower
from hosl_flower.flower import processes
from hosl_flower.flower.stream import client_end as dial
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints import partial_download as ranged
from hosl_flower.models.checkpoints.torch_bin import converted, legacy_keys
from hosl_flower.run.start import run_in_process
from hosl_flower.system import proxies
from hosl_flower.system.directories import claimed
from strategies.hosl import Hosl

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(ModelError, match="cannot be reached \\(proxy: ") as caught:
        resolve(parse_config(keys), "run")
    assert named in str(caught.value)


def test_where_no_proxy_applies_none_is_named(environment, online):
    environment(https_proxy=NOWHERE, no_proxy="huggingface.co")
    assert hub.proxy_note() == ""
    environment(all_proxy="socks4://127.0.0.1:9", no_proxy="*")
    assert hub.proxy_note() == ""


SOURCES = [
    path
    for folder in ("hosl_flower", "strategies", "deploy", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def opens_text_in_the_locales_encoding(call):
    """Whether a call opens a file or a pipe as text and does not say which encoding."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    of = function.value if isinstance(function, ast.Attribute) else None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name not in ("open", "fdopen") or (isinstance(of, ast.Name) and of.id not in ("io", "os")):
        return False
    known = [
        arg.value for arg in [*call.args, keywords.get("mode")] if isinstance(arg, ast.Constant)
    ]
    modes = [v for v in known if isinstance(v, str) and 0 < len(v) < 4 and set(v) <= set("rwaxbt+")]
    return bool(modes or not call.args) and not any("b" in mode for mode in modes)


def test_every_text_is_read_and_written_in_a_given_encoding():
    """Without one it would be the locale's: a file of UTF-8 would be garbled where that is Latin-1,
    without an error."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_in_the_locales_encoding(node)
    ]
    assert not found, f"say encoding='utf-8': {', '.join(found)}"


def test_two_runs_of_one_second_have_a_directory_each(tmp_path):
    path = tmp_path / "runs" / "20261130-120000"
    names = [claimed(path).name for _ in range(3)]
    assert names == [path.name, f"{path.name}-2", f"{path.name}-3"]


def test_a_run_of_default_name_leaves_the_directory_of_another_alone(
    tiny_opt, tmp_path, monkeypatch
):
    run = run_factory(
        Hosl, tiny_opt, tmp_path, **{"steps": 1, "eval-every": 1, "save-model": False}
    )
    monkeypatch.setattr("time.strftime", lambda *_: "20261130-120000")
    (tmp_path / "runs" / "20261130-120000").mkdir(parents=True)
    (tmp_path / "runs" / "20261130-120000" / "config.json").touch()
    run(run_name="")
    assert (tmp_path / "runs" / "20261130-120000-2" / "results.json").is_file()
    assert [p.name for p in (tmp_path / "runs" / "20261130-120000").iterdir()] == ["config.json"]


def test_an_output_directory_that_cannot_be_written_is_found_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("hosl_flower.run.start.open_session", None)  # as loading would begin
    (tmp_path / "file").touch()
    names = ("file", "file/deeper", "n" * 200 + "/" + "/".join(["m" * 200] * 30))
    for name in (*names, "/proc/nope"):
        with pytest.raises(ConfigError, match=r"^output-dir: cannot make or write"):
            run_in_process(Hosl(parse_config({"output-dir": str(tmp_path / name)})))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def legacy_file(tmp_path):
    path = tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"a.0.x": torch.ones(2), "b": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_cache_follows_umask(tmp_path, monkeypatch, legacy_file, umask, mode):
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        assert legacy_keys(legacy_file) == ["a.0.x", "b"]
        converted(legacy_file, "a.0.x")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_cache_that_cannot_be_written_is_named_with_what_to_set(
    tmp_path, monkeypatch, legacy_file
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file.*set HOSL_CACHE"):
        legacy_keys(legacy_file)
    monkeypatch.setenv("HOSL_CACHE", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a user id without account
    with pytest.raises(ModelError, match="no home directory: set HOSL_CACHE"):
        legacy_keys(legacy_file)


def test_a_tensor_in_the_cache_of_another_user_needs_no_lock(tmp_path):
    """Whoever cannot write to the directory cannot make or open a lock there."""
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "x.safetensors.lock").mkdir()  # a lock that nobody can take, root neither
    remote = ranged.RemoteFile("m/model.safetensors", "http://none", tmp_path, {}, 8)
    assert remote.tensor("x") == tmp_path / "x.safetensors"
    (tmp_path / "y.safetensors.lock").mkdir()
    with pytest.raises(ModelError, match="set HOSL_CACHE"):
        remote.tensor("y")


def test_overrides_of_a_simulation_survive_being_written_as_toml(tmp_path, monkeypatch):
    seen = {}

    def flwr(command, environment):
        path = Path(command[command.index("--run-config") + 1])
        seen.update(tomllib.loads(path.read_bytes().decode()), app=command[2])
        (tmp_path / seen["run-name"] / "results.json").touch()
        return 0, ""

    @contextlib.contextmanager
    def superlink():
        (tmp_path / "home").mkdir(exist_ok=True)
        yield {"FLWR_HOME": str(tmp_path / "home")}

    monkeypatch.setattr(local_flower, "private_superlink", superlink)
    monkeypatch.setattr(local_flower, "_echoed", flwr)
    app = tmp_path / "my äpp \N{SLIGHTLY SMILING FACE}"
    app.mkdir()
    nasty = (
        "{text} \N{SLIGHTLY SMILING FACE} \"quoted\" 'single' back\\slash \n\t\r\x7f\x01 # = [x]\n"
    )
    given = {"prompt": nasty, "steps": 3, "save-model": False, "seed": 1, "epsilon": 1e-5}
    results = local_flower.run_flower_app(app, given, "", tmp_path)
    assert {key: seen[key] for key in given} == given
    parse_config({"run-name": seen["run-name"]})
    assert seen["run-name"].endswith("-my-äpp-")
    assert results == tmp_path / seen["run-name"] / "results.json"


@pytest.mark.parametrize("reason", ["", "DivergedError: step 3: training has diverged"])
def test_the_reason_of_a_failed_run_is_the_line_of_the_server_app_alone(reason):
    lines = [
        "step 2 goes on without client 1: SuperNode 40: run failed: ClientError: from a client",
        *([f"run failed: {reason}"] if reason else []),
        "INFO : run failed: KeyError: from Flower",
        "run failed: and no kind of error",
    ]
    command = [sys.executable, "-c", f"print(*{lines!r}, sep=chr(10))"]
    assert local_flower._echoed(command, os.environ) == (0, reason)


def test_a_simulation_that_is_refused_leaves_no_directory_and_a_stopped_one_says_how_to_resume(
    tmp_path, monkeypatch, capsys
):
    def refused(*_):
        return 1, "ConfigError: no"

    monkeypatch.setattr(local_flower, "_submitted", refused)
    with pytest.raises(processes.RunFailedError, match="ConfigError: no"):
        local_flower.run_flower_app(ROOT, {}, "", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()

    def stopped(*_):
        (tmp_path / "runs" / "one" / "checkpoint-4").mkdir(parents=True)
        (tmp_path / "runs" / "one" / "log.txt").write_text("earlier\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(local_flower, "_submitted", stopped)
    with pytest.raises(KeyboardInterrupt):
        local_flower.run_flower_app(ROOT, {"run-name": "one"}, "", tmp_path / "runs")
    way = f"resume={tmp_path}/runs/one goes on from the checkpoint of step 4"
    assert f"run stopped: signal 2 (SIGINT); {way}\n" in capsys.readouterr().err
    earlier, line = (tmp_path / "runs" / "one" / "log.txt").read_text().splitlines()
    assert earlier == "earlier"
    assert line.endswith(f"run stopped: signal 2 (SIGINT); {way}")


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python's encoding is ASCII


def python(*arguments, **environment):
    """A process whose output is ASCII."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="ascii",
        timeout=60,
        check=False,
    )


def test_an_app_is_utf_8_whatever_the_locale(tmp_path):
    prompt = "{text} Catégorie \N{SLIGHTLY SMILING FACE}"
    text = f'[tool.flwr.app.config]\nprompt = "{prompt}"\n'
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    script = (
        "from pathlib import Path;"
        "from hosl_flower.config.app_config import read_app_config as read;"
        f"print(ascii(read(Path({str(tmp_path)!r}), []).task.prompt), open('/dev/null').encoding)"
    )
    done = python("-c", script, **POSIX)
    assert done.stdout == f"{prompt!a} ANSI_X3.4-1968\n", done.stderr


def test_what_the_terminal_cannot_show_is_escaped():
    script = (
        "import hosl_flower.cli, hosl_flower.__main__ as command;"
        "hosl_flower.cli.cli = lambda: print('caf\\xe9');"
        "command.main()"
    )
    done = python("-c", script, **POSIX)
    assert (done.stdout, done.stderr) == ("caf\\xe9\n", "")


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_first_imports_is_an_exit_code_and_no_traceback(tmp_path, number):
    (tmp_path / "typer.py").write_text(
        f"import os, time; os.kill(os.getpid(), {int(number)}); time.sleep(30)"
    )
    done = python("-m", "hosl_flower", "keys", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
