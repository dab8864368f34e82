"""The command line: what a user types and sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.config.app_config import key_value, read_app_config
from hosl_flower.config.run_config import KEYS
from hosl_flower.errors import ConfigError

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
        (["-c", "strategy=nope"], "no such method; expected one of fedavg-zo, frozen-client,"),
        (["-c", "strategy=json:JSONDecoder"], "is not a Method"),
        (["-c", "strategy=.x:Hosl"], "cannot be loaded"),
        (
            ["-c", "strategy=hosl_flower.methods.method:Method"],
            "not a Method with steps",
        ),
        (["-c", "steps=true"], "steps = True"),
        (["-c", "save-model=yes"], "save-model = 'yes': expected true or false"),
        (["-c", "epsilon=1e-60"], "epsilon = 1e-60"),
        (["-c", "server-learning-rate=1e38"], "server-learning-rate = 1e+38"),
        (["-c", "data-path=hub:glue"], "expected hub:<repository>/<configuration>"),
        (["-c", "data-path=/no/such"], "'/no/such' does not exist"),
        (["-c", "output-dir=/proc/nope"], "output-dir: cannot make"),
        (["-c", "=3"], "expected key=value, for example -c steps=100"),
        (["-c", "steps: 3"], "expected key=value"),
        (["-c", "steps=" + "[" * 5000], "steps = '[["),
        (["-c", "output-dir=~nouser/runs"], "the home directory '~nouser' is not known"),
        (["-c", "num-clients=1000000"], "num-clients = 1000000: input should be less than"),
        (["-c", "prompt=\udcff"], "prompt = '\\udcff': it has bytes that are not UTF-8"),
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
    monkeypatch.setattr("hosl_flower.flower.local_run.private_superlink", None)
    done = CliRunner().invoke(cli, ["simulate", QUICKSTART, *arguments])
    assert done.exit_code == 1
    assert complaint in " ".join(done.stderr.split())


def test_a_directory_that_is_no_app_is_refused():
    done = CliRunner().invoke(cli, ["run", str(ROOT / "docs")])
    assert done.exit_code == 1
    assert "docs/pyproject.toml cannot be read" in "".join(done.stderr.split("\n"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[tool.flwr.app]\nx = '\xe9'", "is not TOML in UTF-8"),
        (b"tool =", "is not TOML in UTF-8"),
        (b"tool = " + b"[" * 5000, "is not TOML in UTF-8"),
        (b"tool = 3", "has no sections [tool.flwr.app]"),
        (b"[tool.flwr]\napp = 'x'", "has no sections [tool.flwr.app]"),
        (b"[tool.flwr.app]\nconfig = 3", "has no sections [tool.flwr.app]"),
    ],
)
def test_an_app_that_is_not_one_is_one_line(tmp_path, content, complaint):
    (tmp_path / "pyproject.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_app_config(tmp_path, [])
    assert f"{tmp_path}/pyproject.toml {complaint}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="Not a directory"):
        read_app_config(tmp_path / "pyproject.toml", [])


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("prompt={text} It was", "{text} It was"),
        ('prompt="{text}\\n"', "{text}\n"),
        ('prompt="a" # "b"', '"a" # "b"'),
        ('prompt="a"\nsteps = 3', '"a"\nsteps = 3'),
        ("prompt=\N{SLIGHTLY SMILING FACE} = \\ '", "\N{SLIGHTLY SMILING FACE} = \\ '"),
        ("prompt=5", "5"),
        ("prompt=", ""),
        ("steps=5", 5),
        ("save-model=false", False),
        ("client-learning-rate=1e-3", 1e-3),
    ],
)
def test_a_value_is_a_toml_scalar_or_the_text_as_it_is(given, value):
    assert key_value(given) == (given.partition("=")[0], value)


COMMANDS = typer.main.get_command(cli).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_argument_and_option(name):
    assert COMMANDS[name].help.strip()
    done = CliRunner().invoke(cli, [name, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for param in COMMANDS[name].params:
        assert param.help, param.name
        assert param.help[0].isupper(), param.help
        assert param.help.endswith("."), param.help
        assert param.help[:40] in done.stdout


def fast(directory, text):
    (directory / "fast.toml").write_text(text)
    return directory / "fast.toml"


def test_keys_of_a_file_override_the_app_and_are_overridden(tmp_path):
    app = Path(QUICKSTART)
    own = read_app_config(app)
    one = fast(tmp_path, 'steps = 7\n"batch-size" = 3  # small\nprompt = "{SMS} is"\n')
    two = tmp_path / "two.toml"
    two.write_text("\N{ZERO WIDTH NO-BREAK SPACE}steps = 8")
    assert own.steps not in (7, 8, 9)
    assert read_app_config(app, files=[one]) == own.with_keys(
        {"steps": 7, "batch-size": 3, "prompt": "{SMS} is"}
    )
    assert read_app_config(app, files=[one, two]).steps == 8
    assert read_app_config(app, ["steps=9"], [one, two]).steps == 9


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# a\n'stepz' = 3", "stepz: no such key; did you mean 'steps'? ({file}, line 2)"),
        ("\nsteps = true", "steps = True: input should be a valid integer ({file}, line 2)"),
        ("[client]\ntrainable = 'lora'", "{file}: client is a table; expected keys without"),
        ("steps =", "--config {file} is not TOML in UTF-8: Invalid value (at end of document)"),
    ],
)
def test_mistakes_in_a_file_of_keys_name_it(tmp_path, text, complaint):
    file = fast(tmp_path, text)
    for command in ("run", "simulate", "plan"):
        done = CliRunner().invoke(cli, [command, QUICKSTART, "--config", str(file)])
        assert done.exit_code == 1
        assert complaint.format(file=file) in " ".join(done.stderr.split())


def test_a_file_that_is_not_there_is_refused_and_an_old_spelling_helped(tmp_path):
    for argument, complaint in (
        (str(tmp_path / "none.toml"), "none.toml cannot be read (No such file or directory)"),
        ("steps=3", "to set a key, use -c steps=3"),
    ):
        done = CliRunner().invoke(cli, ["run", QUICKSTART, "--config", argument])
        assert done.exit_code == 1
        assert complaint in " ".join(done.stderr.split())


def test_simulate_passes_the_keys_of_a_file_to_flower(tmp_path, monkeypatch):
    passed = {}

    def run_flower_app(app, overrides, federation, output):
        passed.update(overrides)
        return output / "results.json"

    monkeypatch.setattr("hosl_flower.flower.local_run.run_flower_app", run_flower_app)
    file = fast(tmp_path, f"steps = 7\neval-every = 7\noutput-dir = '{tmp_path}'")
    arguments = ["simulate", QUICKSTART, "--config", str(file), "-c", "steps=5"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    assert passed == {"steps": 5, "eval-every": 7, "output-dir": str(tmp_path)}


def test_compare_takes_keys_of_a_file_too(tmp_path):
    experiment = tmp_path / "experiment.toml"
    experiment.write_text("seeds = [0]\n[methods.a]\nstrategy = 'hosl'\n")
    file = fast(tmp_path, "stepz = 3")
    done = CliRunner().invoke(cli, ["compare", str(experiment), "--config", str(file)])
    assert done.exit_code == 1
    assert f"{file}, line 1: stepz: no such key; did you mean 'steps'?" in " ".join(
        done.stderr.split()
    )


def rows_of(*arguments):
    """The rows that `keys` prints where there is no terminal, by key."""
    done = CliRunner().invoke(cli, ["keys", *arguments])
    assert done.exit_code == 0
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    return {row[0].strip("|` "): row[1:] for row in rows}


def test_keys_prints_a_row_for_each_key():
    rows = rows_of()
    assert rows.keys() == KEYS.keys()
    assert all(len(row) == 4 for row in rows.values())
    assert rows["cut-layer"][:3] == ["integer, ≥ 0", "`5`", "all"]
    assert rows["partitioner"][0] == "`iid`, `dirichlet`, `natural-id`"
    assert rows["local-steps"][0] == "integer, 1 to 10,000"
    assert rows["trim-fraction"][0] == "number, ≥ 0, < 0.5"
    assert rows["client-learning-rate"][0] == "number, 0 to 1,000"
    assert rows["save-model"][:2] == ["true or false", "`true`"]
    assert rows["upload-every"][2] == "heron-sfl"
    assert rows["client-learning-rate"][2] == "all except frozen-client"


def test_keys_are_found_by_name_and_meaning():
    assert rows_of("^dp-").keys() == {"dp-noise", "dp-clip", "dp-delta"}
    assert "codec" in rows_of("SCALE PER TOKEN")
    assert "prompt" in rows_of("{sentence} It")
    assert rows_of("(").keys()  # not a regular expression: looked for as it is
    done = CliRunner().invoke(cli, ["keys", "no such key"])
    assert done.exit_code == 1
    assert "no key or meaning contains 'no such key'" in " ".join(done.stderr.split())


def test_keys_on_a_terminal_are_tables_of_its_width(monkeypatch):
    monkeypatch.setattr("hosl_flower.cli.key_tables.on_terminal", lambda: True)
    done = CliRunner().invoke(cli, ["keys", "rate"])
    assert done.exit_code == 0
    assert "client-learning-rate" in done.stdout
    assert "used by: all except" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
