"""The wheel, in an environment that has its dependencies and not this checkout: it brings all that
`hosl-flower new`, `run` and `simulate` need."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from hosl_flower.flower.app_template import template_names

ROOT = Path(__file__).parents[2]
PACKAGES = ("hosl_flower", "strategies")
QUICK = ["-c", "steps=3", "-c", "eval-every=3", "-c", "eval-examples=40", "-c", "batch-size=8",
         "-c", "output-dir=runs", "-c", "threads=1"]  # fmt: skip


def ran(*command, **options):
    """What a command prints; on stderr too where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", directory]
    ran(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (made,) = directory.glob("hosl_flower-*.whl")
    return made


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    """The directory of commands of a new environment with the wheel in it."""
    directory = tmp_path_factory.mktemp("environment")
    ran(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    ran(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    # of a directory named in a .pth file, Python reads no .pth files: not the editable checkout's
    (own,) = directory.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for entry in distribution("flwr").entry_points:  # Flower starts its processes by these names
        script = f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
        (python.parent / entry.name).write_text(f"{script}sys.exit({entry.attr}())\n")
        (python.parent / entry.name).chmod(0o755)
    return python.parent


@pytest.fixture
def installed(commands, tmp_path):
    """Runs a command of that environment, outside the checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"

    def run(name, *arguments):
        return ran(commands / name, *arguments, cwd=tmp_path, env=environment, timeout=300)

    return run


def test_every_file_of_the_packages_is_in_it(wheel):
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"hosl_flower/py.typed", "hosl_flower/system/bundled/sms_spam/train.tsv"} <= files
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith(PACKAGES)}
    assert {name for name in inside if ".dist-info/" not in name} == files


def test_it_registers_its_methods(installed, commands):
    script = (
        "import hosl_flower, strategies, json; from importlib.metadata import entry_points as e;"
        "methods = {m.name: m.load().__name__ for m in e(group='hosl_flower.strategies')};"
        "print(json.dumps([hosl_flower.__file__, strategies.__file__, methods]))"
    )
    *packages, methods = json.loads(installed("python", "-c", script))
    assert all(Path(package).is_relative_to(commands.parent) for package in packages)
    assert methods["hosl"] == "Hosl"
    assert len(methods) >= 9


def test_an_app_that_it_makes_trains_with_and_without_flower(installed, tmp_path):
    for template in template_names():
        installed("hosl-flower", "new", template, "--from", template)
        assert {path.name for path in (tmp_path / template).iterdir()} == {
            "pyproject.toml", "README.md", ".gitignore",
        }  # fmt: skip
    installed("hosl-flower", "run", "quickstart", *QUICK, "-c", "run-name=alone")
    assert "results: " in installed(
        "hosl-flower", "simulate", "quickstart", *QUICK, "-c", "run-name=flower"
    )
    alone, flower = (
        json.loads((tmp_path / "runs" / name / "results.json").read_text())
        for name in ("alone", "flower")
    )
    assert alone["steps"] == 3
    assert (alone["loss"], alone["fingerprint"]) == (flower["loss"], flower["fingerprint"])
