"""What a server can have opened on a client, and what a client's errors tell it."""

import contextlib
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.config import parse_config_args
from flwr.supercore.task_identity import TaskIdentity
from specs import client_spec

from hosl_flower.config.node_config import NodeConfig
from hosl_flower.errors import (
    ClientError,
    DataError,
    ProtocolError,
    RefusedError,
    public_reason,
)
from hosl_flower.flower import client_app, client_calls
from hosl_flower.flower.message_link import EXCHANGE
from hosl_flower.flower.records import pack, pack_invitation, unpack_replies
from hosl_flower.flower.stream import client_end as dial
from hosl_flower.flower.stream.calls import SESSION
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.tasks.task import Task

SECRET = "hunter2"
ANYTHING = {"allow-data": "*,hub:*,bundled:*", "allow-models": "*"}
_LISTENERS: list[list[str]] = []  # an audit hook stays for good


def _hear(event, arguments):
    if _LISTENERS and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
        _LISTENERS[-1].append(str(arguments[0]))


sys.addaudithook(_hear)


@contextlib.contextmanager
def opened():
    """The paths that Python opens or lists meanwhile."""
    paths: list[str] = []
    _LISTENERS.append(paths)
    try:
        yield paths
    finally:
        _LISTENERS.remove(paths)


@pytest.fixture(autouse=True)
def _a_device(monkeypatch, tmp_path):
    """A ClientApp's process, with secrets around it."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(client_calls, "_cached", {})
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    for folder in (home / ".ssh", home / "model", cwd / "owner" / "thing", cwd / "model"):
        folder.mkdir(parents=True)
    for file in (
        home / "noise-secret", home / ".ssh" / "id", cwd / "mine.txt",
        *(folder / name for folder in (home / "model", cwd / "owner" / "thing", cwd / "model")
          for name in ("config.json", "tokenizer.json", "train.csv")),
    ):  # fmt: skip
        file.write_text(f"text,label\n{SECRET},7\n")
    (cwd / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)


def message(content, kind):
    made = Message(content, dst_node_id=7, message_type=kind)
    made.metadata._message_id = "m"
    return made


def ask(spec, config):
    """The reply to Describe of a SuperNode with this configuration."""
    at = {"step": 1, "partition": 0, "position": 0, "digest": "0" * 16}
    asked = message(pack([[Describe(**at)]], spec), EXCHANGE)
    context = Context(1, 7, {"partition-id": 0, **config}, RecordDict(), {})
    answer = client_app.exchange(asked, context).content
    raw = str(answer.config_records) + str(
        [a.data for a in answer.array_records["arrays"].values()]
    )
    assert SECRET not in raw
    ((reply,),) = unpack_replies(answer)
    return reply


SOURCES = [
    "/etc/passwd", "{home}/noise-secret", "{home}", "~/.ssh/id", "~root", "mine.txt", "./mine.txt",
    "link/noise-secret", "file:///etc/passwd", "file://{home}/noise-secret", "hub:../../etc",
    "hub:/etc/passwd", "hub:{home}/model", "hub:~/model/x", "hub:./owner/thing", "hub:text/default",
    "hub:csv/default", "hub:owner/../thing/x", "hub:owner/thing/default", "hub:", "bundled:",
    "bundled:../../home", "bundled:{home}", "bundled:.", "bundled:sms_spam/../..", "s3://bucket/x",
    "https://example.org/x.csv", "zip://x::/etc/passwd", "HUB:owner/x/y", " /etc/passwd",
]  # fmt: skip
MODELS = [
    "{home}/model", "~/model", "./model", "../cwd/model", "model", "owner/thing", "link/model",
    "file://{home}/model", "/etc", "..", "~", "owner/../model", "a/b/c",
]  # fmt: skip


@pytest.mark.parametrize("config", [{}, ANYTHING], ids=["nothing-allowed", "all-hub-ids-allowed"])
def test_no_path_that_a_server_names_is_opened(tmp_path, config):
    home = str(tmp_path / "home")
    hostile = [client_spec(source=source.format(home=home)) for source in SOURCES]
    hostile += [client_spec(model=model.format(home=home)) for model in MODELS]
    with opened() as paths:
        for spec in hostile:
            reply = ask(spec, config)
            assert isinstance(reply, Failure)
            assert reply.error.startswith("RefusedError: "), (spec.source, spec.model, reply.error)
    assert [p for p in paths if p.startswith((str(tmp_path), "/etc", "mine", "link", "own"))] == []


def test_nothing_of_the_hub_is_used_unless_the_node_says_so(monkeypatch):
    def load_dataset(repository, configuration):
        assert (repository, configuration) == ("stanfordnlp/imdb", "plain_text")
        rows = datasets.Dataset.from_dict({"SMS": ["good", "bad"] * 20, "Label": [0, 1] * 20})
        return datasets.DatasetDict({"train": rows, "test": rows})

    builder = SimpleNamespace(config=SimpleNamespace(data_files=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = client_spec(source="hub:stanfordnlp/imdb/plain_text")
    refused = ask(spec, {"allow-data": "hub:other/*"})
    assert 'allow-data="hub:stanfordnlp/imdb/plain_text"' in refused.error
    assert isinstance(ask(spec, {"allow-data": "hub:other/*, hub:stanfordnlp/*"}), Described)
    with pytest.raises(RefusedError, match=r'allow-models="facebook/opt-125m"'):
        NodeConfig.read({}).check("", "facebook/opt-125m")
    for allowed in ("facebook/opt-125m", "x,facebook/*", "*/opt-125m"):
        NodeConfig.read({"allow-models": allowed}).check("", "facebook/opt-125m")
    with pytest.raises(RefusedError):
        NodeConfig.read({"allow-models": "facebook/opt"}).check("", "facebook/opt-125m")


def test_what_a_node_has_of_its_own_takes_the_place_of_what_a_run_names(tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text("SMS,Label\n" + "good,ham\nbad,spam\n" * 10)
    assert isinstance(ask(client_spec(source="/etc/passwd"), {"data-path": str(mine)}), Described)
    NodeConfig.read({"model-path": "/models/mine"}).check("", "/models/another")


def test_a_path_that_the_node_allows_is_opened_in_the_same_letters_alone(tmp_path):
    shared = tmp_path / "shared.csv"
    shared.write_text("SMS,Label\n" + "good,ham\nbad,spam\n" * 10)
    config = {"allow-data": str(shared)}
    with opened() as paths:
        assert isinstance(ask(client_spec(source=str(shared)), config), Described)
    assert str(shared) in paths
    for other in (f"{tmp_path}/./shared.csv", f"{shared}x", str(tmp_path)):
        assert ask(client_spec(source=other), config).error.startswith("RefusedError")
    config = {"allow-data": f"{tmp_path}/*"}  # of paths there are no patterns
    assert ask(client_spec(source=str(shared)), config).error.startswith("RefusedError")


def test_in_a_simulation_all_is_one_machine_and_errors_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(client_calls, "is_simulated", lambda: True)
    data = tmp_path / "mine.csv"
    data.write_text("SMS,Label\n" + "good,ham\n" * 9 + "bad,seven\n")
    reply = ask(client_spec(source=str(data)), {})
    assert f"{data}, line 11, column 'Label': label 'seven' is not one of" in reply.error
    monkeypatch.setattr(client_calls, "_cached", {})
    assert "/no/model" in ask(client_spec(model="/no/model"), {}).error


def test_the_base_of_allowed_adapters_must_be_allowed_too(monkeypatch):
    monkeypatch.setattr(
        client_calls, "find_adapters", lambda model: SimpleNamespace(base="stranger/base")
    )
    spec, config = client_spec(model="org/adapters"), {"allow-models": "org/*"}
    error = ask(spec, config).error
    assert error.startswith("RefusedError: this SuperNode does not allow the model 'stranger/base'")
    assert 'allow-models="stranger/base"' in error


ROWS = "good,ham\nbad,spam\n" * 5


@pytest.mark.parametrize(
    "content",
    [
        f"SMS,Label\n{ROWS}x,{SECRET}\n",  # a label
        f"SMS,Label\n{ROWS}x,{SECRET},{SECRET}\n",  # a line that does not fit
        f"{SECRET}\n{ROWS}",  # the first line as the names of columns
        f'SMS,Label\n"{SECRET}" {SECRET},ham\n',  # quoting
        f"SMS,Label\n{SECRET},\n",  # no label
    ],
)
def test_an_error_about_data_leaves_without_data(tmp_path, caplog, content):
    data = tmp_path / f"{SECRET}.csv"  # names of files stay too
    data.write_text(content)
    reply = ask(client_spec(), {"data-path": str(data)})
    assert reply.error.startswith("DataError: ")
    assert str(tmp_path) not in reply.error
    assert SECRET in caplog.text  # for whoever has the device


def test_an_exception_that_nobody_expects_leaves_as_its_kind(tmp_path, monkeypatch, caplog):
    def fail(spec, context):
        raise ValueError(f"{tmp_path}: {SECRET}")

    monkeypatch.setattr(client_calls, "_client", fail)
    with pytest.raises(ClientError, match=r"ValueError: .* in the log of this client") as error:
        ask(client_spec(), {})
    assert SECRET not in str(error.value)
    assert SECRET in caplog.text
    own = {"partition-id": 0, "stream-insecure": SECRET}
    assert ask_session(own, "127.0.0.1:1").startswith("ConfigError: stream-insecure in")


def test_an_error_is_public_where_it_says_so_and_nowhere_else():
    assert public_reason(DataError(SECRET)) == "DataError: the reason is in the log of this client"
    assert public_reason(DataError(SECRET, public="row 7")) == "DataError: row 7"
    assert public_reason(KeyError(SECRET)).startswith("KeyError: the reason is in the log")
    assert public_reason(RefusedError("no")) == "RefusedError: no"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limit", -1),
        ("limit", 0),
        ("limit", 2**31),
        ("patience", -1.0),
        ("patience", 61.0),
        ("patience", float("nan")),
        ("patience", float("inf")),
    ],
)
def test_an_invitation_sets_no_limit_beyond_those_of_this_project(key, value):
    good = json.loads(dial.Invitation("localhost:1", "t", "", 2**31 - 1, 60.0).to_json())
    dial.Invitation.from_json(json.dumps(good))
    with pytest.raises(ProtocolError, match=rf"^invitation to a stream, {key}: Input should be"):
        dial.Invitation.from_json(json.dumps({**good, key: value}))
    with pytest.raises(ProtocolError, match=r"^invitation to a stream, the whole: Invalid JSON"):
        dial.Invitation.from_json("no")


def ask_session(config, endpoint, authority=""):
    """What a SuperNode says at the end of a session, or before it begins."""
    invitation = dial.Invitation(endpoint, "t" * 32, authority, 1 << 20, 60.0)
    asked = message(pack_invitation(invitation, client_spec()), SESSION)
    reply = client_app.session(asked, Context(1, 7, config, RecordDict(), {}))
    return str(reply.content.config_records["config"]["error"])


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("192.0.2.7:8443", "has no TLS and leaves this machine: .*stream-insecure=true"),
        ("server.example.org:8443", "has no TLS"),
        ("localhost.example.org:8443", "has no TLS"),
        ("[2001:db8::1]:8443", "has no TLS"),
        ("unix:/var/run/docker.sock", "dials host:port alone"),
        ("unix-abstract:1", "has no TLS"),  # a host of that name
        ("dns:///192.0.2.7:8443", "dials host:port alone"),
        ("127.0.0.1", "dials host:port alone"),
        ("127.0.0.1:99999", "dials host:port alone"),
        ("127.0.0.1:80/x", "dials host:port alone"),
    ],
)
def test_a_client_dials_in_the_clear_on_its_own_machine_alone(monkeypatch, endpoint, says):
    monkeypatch.setattr(client_calls, "_client", lambda *_: SimpleNamespace(answer=None))
    monkeypatch.setattr(dial._Caller, "connect", pytest.fail)
    reason = ask_session({}, endpoint)
    assert reason.startswith("RefusedError: ")
    assert re.search(says, reason)


@pytest.mark.parametrize(
    ("endpoint", "authority", "config"),
    [
        ("127.0.0.1:8443", "", {}),
        ("localhost:8443", "", {}),
        ("[::1]:8443", "", {}),
        ("192.0.2.7:8443", "PEM", {}),
        ("server.example.org:8443", "", {"stream-insecure": True}),
    ],
)
def test_a_client_dials_with_tls_or_where_its_node_says_so(
    monkeypatch, endpoint, authority, config
):
    dialled = []

    def connect(caller):
        dialled.append(caller.invitation.endpoint)
        caller.closed = True

    monkeypatch.setattr(client_calls, "_client", lambda *_: SimpleNamespace(answer=None))
    monkeypatch.setattr(dial._Caller, "connect", connect)
    assert ask_session(config, endpoint, authority) == ""
    assert dialled == [endpoint]


@pytest.mark.parametrize(
    ("task", "allowed"),
    [
        (Task("own", "{text}", ("a", "b")), True),
        (Task("own", "{text}", target="ssn"), False),
        (Task("own", "{ssn}", ("a", "b")), False),
        (Task("own", "{x}", ("a", "b"), columns={"x": ("text ssn",)}), False),
        (Task("own", "{text}", ("a", "b"), header=("label", "x", "text")), True),
    ],
)
def test_a_node_says_which_of_its_columns_a_run_may_use(tmp_path, task, allowed):
    data = tmp_path / "mine.csv"
    data.write_text("label,text,ssn\n" + f"0,one,{SECRET}\n1,two,{SECRET}\n" * 5)
    config = {"data-path": str(data), "data-columns": "text, label"}
    reply = ask(client_spec(task=task), config)
    assert isinstance(reply, Described if allowed else Failure)
    assert isinstance(ask(client_spec(task=task), {"data-path": str(data)}), Described)


def test_a_run_cannot_give_other_names_to_the_columns_of_a_file_without_any(tmp_path):
    data = tmp_path / "mine.csv"
    data.write_text(f"0,one,{SECRET}\n1,two,{SECRET}\n" * 5)
    task = Task("own", "{text}", ("a", "b"), header=("label", "x", "text"))
    config = {"data-path": str(data)}
    assert isinstance(ask(client_spec(task=task), config), Described)
    reply = ask(client_spec(task=task), {**config, "data-columns": "text,label"})
    assert reply.error.startswith("DataError: the data has none of the columns of data-columns")


def documented():
    """Every node config that the documentation and deploy/ give as an example."""
    root = Path(__file__).parents[2]
    for name in (
        "deploy/systemd/hosl-supernode.service",
        "docs/how-to/deploy.md",
    ):
        text = (root / name).read_text()
        found = re.findall(
            r"--node-config '([^']+)'|NODE_CONFIG='([^']+)'|# NODE_CONFIG=(.+)", text
        )
        assert found, name
        yield from ("".join(groups) for groups in found)


def test_the_node_configs_of_the_guides_are_read_as_they_are_meant():
    known = {field.name.replace("_", "-") for field in fields(NodeConfig)}
    for text in documented():
        config = parse_config_args([text])
        assert set(config) <= known | {"partition-id", "num-partitions"}, text
        node = NodeConfig.read(config)
        assert "facebook/opt-125m" in node.allow_models  # the model of the runs that are shown
        node.check("hub:nyu-mll/glue/sst2", "facebook/opt-125m")
    page = (Path(__file__).parents[2] / "docs" / "reference" / "node-config.md").read_text()
    assert all(f"| `{key}` |" in page for key in known)
