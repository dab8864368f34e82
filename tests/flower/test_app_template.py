"""`hosl-flower new`: apps from templates, and the simulations that the same code writes."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from test_imports import loaded_with
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.config.app_config import read_app_config
from hosl_flower.config.run_config import KEYS
from hosl_flower.flower.app_template import SECTIONS, read_template, template_names

ROOT = Path(__file__).parents[2]
DEFAULTS = {name: key.field.default for name, key in KEYS.items()}
by_template = pytest.mark.parametrize("template", template_names())


def new(*arguments):
    return CliRunner().invoke(cli, ["new", *map(str, arguments)])


@by_template
def test_an_app_has_every_key_with_its_default_or_the_templates_value(tmp_path, template):
    done = new(tmp_path / "deep" / "app", "--from", template)
    assert done.exit_code == 0, done.output
    app = tmp_path / "deep" / "app"
    assert done.stdout.split() == ["created:", str(app)]
    written = tomllib.loads((app / "pyproject.toml").read_text())
    assert written["project"]["name"] == template
    values = written["tool"]["flwr"]["app"]["config"]
    assert list(values) == list(DEFAULTS)
    own = {key: value for key, value in values.items() if value != DEFAULTS[key]}
    assert own == read_template(template).config, "a template holds what differs, and known keys"
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in DEFAULTS.items()
    }
    read_app_config(app, [])


@by_template
def test_the_readme_names_what_differs(tmp_path, template):
    new(tmp_path, "--from", template)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"# {template}\n")
    assert all(f"| `{key}` | " in text for key in read_template(template).config)
    assert text.isascii()
    assert "\n\n\n" not in text


def test_comments_and_sections_belong_to_keys():
    for name in template_names():
        assert read_template(name).comments.keys() <= DEFAULTS.keys()
    assert SECTIONS.keys() <= DEFAULTS.keys()
    assert next(iter(SECTIONS)) == next(iter(DEFAULTS))


def test_the_default_is_quickstart(tmp_path):
    assert new(tmp_path).exit_code == 0
    assert read_app_config(tmp_path, []).model == "random:opt-tiny"


def test_a_flower_app_leaves_runs_out(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    new(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("{}\n")
    made = build_fab_from_disk(tmp_path)
    assert b"README.md" in made
    assert b"metrics.jsonl" not in made


@pytest.mark.parametrize("what", ["directory", "file", "template", "below a file"])
def test_what_cannot_be_made_is_one_line(tmp_path, what):
    (tmp_path / "there").write_text("mine")
    arguments, complaint = {
        "directory": ([tmp_path], f"{tmp_path} exists and is not empty"),
        "file": ([tmp_path / "there"], "there exists and is not empty"),
        "template": (
            [tmp_path / "a", "--from", "opt"],
            f"--from = 'opt' is not a template; expected one of {', '.join(template_names())}",
        ),
        "below a file": ([tmp_path / "there" / "a"], "there/a cannot be written"),
    }[what]
    done = new(*arguments)
    assert done.exit_code == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_it_needs_no_torch_and_no_flower():
    loaded = loaded_with("hosl_flower.flower.app_template")
    assert not {"torch", "flwr", "numpy"} & set(loaded)


def test_simulations_are_as_their_templates_say():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = generate.simulations()
    assert sorted(written) == sorted(ROOT.glob("simulations/*/pyproject.toml"))
    for path, text in written.items():
        assert path.read_text() == text, "run `python docs/generate.py`"
