"""What `from hosl_flower import ...` gives, and methods that are found by their names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hosl_flower
from hosl_flower import ConfigError, HoslError, load_method, parse_config
from hosl_flower.methods import load, registry

ROOT = Path(__file__).parents[1]
NAMES = set(hosl_flower.__all__) - {"__version__"}


def test_every_public_name_is_there_typed_and_documented():
    for name in NAMES:
        assert getattr(hosl_flower, name).__name__ == name
    tree = ast.parse((ROOT / "hosl_flower" / "__init__.py").read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.asname for node in typed.body for alias in node.names}
    assert imported == NAMES
    pages = [path.read_text() for path in (ROOT / "docs" / "reference" / "api").glob("*.md")]
    documented = re.findall(r"^::: hosl_flower\.(\w+)$", "".join(pages), re.M)
    assert sorted(documented) == sorted(NAMES)
    assert (ROOT / "hosl_flower" / "py.typed").is_file()


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Compute'"):
        _ = hosl_flower.Compute


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, hosl_flower; print({'torch', 'flwr', 'pydantic'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


def test_methods_have_the_names_they_are_registered_under():
    ours = {name: entry for name, entry in registry.registered().items()
            if entry.module.startswith("strategies.")}  # fmt: skip
    assert len(ours) == 9
    for name in ours:
        assert load.method_class(name).name == name


def test_an_old_reference_is_the_same_method():
    old, new = (load_method(parse_config({"strategy": s, "task": "sms-spam"}))
                for s in ("strategies.ho_sfl:HoSfl", "ho-sfl"))  # fmt: skip
    assert type(old) is type(new)
    assert registry.place_of("ho-sfl") == "strategies.ho_sfl:HoSfl"


def test_another_package_registers_a_method(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from strategies.hosl import Hosl\n\nclass Theirs(Hosl):\n    name = 'theirs'\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\ntheirs = theirs:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.registered.cache_clear()
    try:
        assert load.method_class("theirs").name == "theirs"
    finally:
        registry.registered.cache_clear()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such method; expected one of fedavg-zo, .*split-zo"):
        load.method_class("hosel")
    assert issubclass(ConfigError, HoslError)
