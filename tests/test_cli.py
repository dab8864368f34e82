"""The command line: what a user types and sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hosl_flower.cli import cli

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "simulations" / "quickstart")


def test_run_trains_and_leaves_a_run_directory(tmp_path):
    arguments = [
        "-c", f"output-dir={tmp_path}", "-c", "run-name=one", "-c", "steps=3",
        "-c", "eval-examples=40", "-c", 'prompt={SMS} It is "x" or',
        "-c", "verbalizers=not spam,spam",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hosl_flower", "run", "simulations/quickstart", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["steps"] == 3
    assert results["pretrained"] is False
    assert "cut after block 1 of 4" in done.stderr
    assert "'not spam' has 2 tokens: each example is 2 sequences" in done.stderr
    assert done.stderr.strip().endswith(str(tmp_path / "one"))


def test_without_the_packages_it_needs_it_says_what_to_activate():
    done = subprocess.run(  # -S: no site-packages
        [sys.executable, "-S", "-m", "hosl_flower", "keys"],
        cwd=ROOT, env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no package 'typer'")
    assert ". .venv/bin/activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-c", "stepz=3"], "stepz: no such key; did you mean 'steps'?"),
        (["-c", "steps"], "expected key=value"),
        (["-c", "cut-layer=9"], "cut-layer = 9 is outside 0..4"),
        (["-c", "strategy=strategies.nope:Nope"], "cannot be loaded"),
        (["-c", "strategy=hosl:Hosl"], "did you mean 'strategies.hosl:Hosl'?"),
        (["-c", "strategy=json:JSONDecoder"], "is not a SplitStrategy"),
        (["-c", "strategy=.x:Hosl"], "cannot be loaded"),
        (["-c", "strategy=hosl_flower.strategy:SplitStrategy"], "not a SplitStrategy with a step"),
        (["-c", "steps=true"], "steps = True"),
        (["-c", "save-model=yes"], "save-model = 'yes': expected true or false"),
        (["-c", "epsilon=1e-60"], "epsilon = 1e-60"),
        (["-c", "server-learning-rate=1e38"], "server-learning-rate = 1e+38"),
        (["-c", "data-path=hub:glue"], "expected hub:<repository>/<configuration>"),
        (["-c", "data-path=/no/such"], "'/no/such' does not exist"),
        (["-c", "output-dir=/proc/nope"], "output-dir: cannot make"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(arguments, complaint):
    done = CliRunner().invoke(cli, ["run", QUICKSTART, *arguments])
    assert done.exit_code == 1
    assert complaint in " ".join(done.stderr.split())
    assert isinstance(done.exception, SystemExit), "no traceback"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-c", "steps=0"], "steps = 0"),
        (["-c", "local-steps=2"], "hosl does not use local-steps"),
        (["-c", "strategy=strategies.nope:Nope"], "cannot be loaded"),
    ],
)
def test_simulate_refuses_mistakes_before_it_starts_anything(arguments, complaint, monkeypatch):
    monkeypatch.setattr("hosl_flower.local_flower.private_superlink", None)
    done = CliRunner().invoke(cli, ["simulate", QUICKSTART, *arguments])
    assert done.exit_code == 1
    assert complaint in " ".join(done.stderr.split())


def test_a_directory_that_is_no_app_is_refused():
    done = CliRunner().invoke(cli, ["run", str(ROOT / "docs")])
    assert done.exit_code == 1
    assert "docs/pyproject.toml cannot be read" in "".join(done.stderr.split("\n"))


def test_keys_prints_the_table():
    done = CliRunner().invoke(cli, ["keys"])
    assert done.exit_code == 0
    assert "| `cut-layer` | `5` |" in done.stdout
