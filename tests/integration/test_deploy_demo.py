"""deploy/demo.py as `make deploy-demo` runs it, and a SuperNode that nobody has registered."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("deploy_demo", HERE / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_trains_and_leaves_nothing_behind(demo, tmp_path, monkeypatch, capfd):
    made = tmp_path / "home"
    made.mkdir()
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda **_: str(made))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "runs")])
    demo.main()
    (results,) = (tmp_path / "runs").glob("*/results.json")
    clients = json.loads(results.read_text())["clients"]
    assert sum(clients["steps_taken_part"].values()) == 2 * demo.RUN["steps"]
    assert clients["fingerprint_checked"] == [0, 1, 2]
    assert not clients["dropped"]
    printed = capfd.readouterr().out
    assert "--enable-supernode-auth" in printed
    assert "took part: {'0': " in printed
    assert not made.exists()


def test_a_supernode_nobody_has_registered_is_refused(demo, tmp_path):
    with demo.deployment(tmp_path) as own:
        key = own.make_key("stranger")
        node = own.start_supernode(0, key, Path("/nowhere"))
        give_up = time.monotonic() + 90
        while node.poll() is None and time.monotonic() < give_up:
            time.sleep(0.2)
        assert node.poll() not in (None, 0)
        assert "Failed to activate SuperNode" in (tmp_path / "supernode0.log").read_text()
        own.register(key)
        node = own.start_supernode(1, key, Path("/nowhere"))
        while "SuperNode ID" not in (tmp_path / "supernode1.log").read_text():
            assert time.monotonic() < give_up
            assert node.poll() is None
            time.sleep(0.2)
