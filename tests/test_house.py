"""The packages depend on each other in one direction: what may import what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hosl_flower"
# what a package may import of this library, besides errors
ALLOWED = {
    "system": set(),
    "tensors": set(),
    "tasks": set(),
    "zo": {"tensors"},
    "models": {"tensors", "tasks", "system"},
    "optim": {"tensors", "zo"},
    "config": {"tensors", "tasks", "models"},
    "gradients": {"tensors", "models", "optim"},
    "data": {"config", "models", "tasks", "tensors", "system"},
    "privacy": {"config", "zo", "tensors"},
    "ledger": {"config", "gradients", "models", "optim", "tasks", "tensors", "zo", "system"},
    "protocol": {"ledger", "tasks", "tensors", "zo"},
    "client": {
        "protocol", "ledger", "data", "gradients", "models", "privacy", "config", "tasks",
        "tensors", "zo",
    },
    "server": {
        "protocol", "ledger", "data", "models", "optim", "privacy", "config", "tasks", "tensors",
        "zo",
    },
    "methods": {
        "server", "protocol", "ledger", "data", "optim", "privacy", "config", "tensors", "zo",
    },
    "run": {
        "methods", "client", "server", "protocol", "ledger", "models", "privacy", "config",
        "tasks", "tensors", "system",
    },
    "flower": {
        "run", "methods", "client", "server", "protocol", "data", "models", "privacy", "config",
        "tensors", "system",
    },
    "export": {"run", "server", "data", "config", "models", "tasks", "tensors", "system"},
    "compare": {"flower", "run", "methods", "data", "config", "system"},
    "report": {"compare", "run", "config", "tensors", "system"},
    "cli": {
        "report", "compare", "export", "flower", "run", "methods", "data", "models", "config",
        "tasks", "system",
    },
}  # fmt: skip
METHODS = ALLOWED["methods"] | {"methods"}
FLOWER = {"flwr", "ray", "grpc"}
PICTURES = ("run/figures.py", "compare/", "report/")


def name_of(path: Path) -> str:
    """The dotted name of a file below the root."""
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


FILES = {name_of(path): path for top in ("hosl_flower", "strategies")
         for path in sorted((ROOT / top).rglob("*.py"))}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def of_ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name in FILES}


def package_of(name: str) -> str:
    """The package below hosl_flower, or the file beside the packages."""
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_what_it_may(package):
    wrong = {
        f"{name} imports {other}"
        for name, path in FILES.items()
        if name.startswith(f"hosl_flower.{package}.")
        for other in of_ours(path)
        if package_of(other) not in {package, "errors", *ALLOWED[package]}
    }
    assert not wrong


def test_every_package_has_its_row_and_the_house_has_no_more_rooms():
    beside = {"__init__.py", "__main__.py", "__pycache__", "py.typed", "errors.py"}
    entries = {path.name for path in PACKAGE.iterdir()}
    assert entries - beside == ALLOWED.keys()
    assert len(entries - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}) <= 22


def test_methods_import_what_the_base_of_methods_may():
    wrong = {
        f"{name} imports {other}"
        for name, path in FILES.items()
        if name.startswith("strategies.")
        for other in of_ours(path)
        if not other.startswith("strategies.") and package_of(other) not in {"", "errors", *METHODS}
    }
    assert not wrong
    assert not [name for name, path in FILES.items() if name.startswith("hosl_flower.")
                and any(other.startswith("strategies") for other in imported(path))]  # fmt: skip


def test_flower_is_imported_in_its_room_alone():
    for name, path in FILES.items():
        top = {other.split(".")[0] for other in imported(path)}
        if not name.startswith("hosl_flower.flower."):
            assert not top & FLOWER, name
        if name != "hosl_flower.data.partition" and name != "hosl_flower.data.client_data":
            assert "flwr_datasets" not in top, name
        if not str(path.relative_to(PACKAGE.parent)).startswith(
            tuple(f"hosl_flower/{place}" for place in PICTURES)
        ):
            assert "matplotlib" not in top, name


def test_there_is_no_circle_of_files():
    edges = {name: of_ours(path) - {name} for name, path in FILES.items() if name != "hosl_flower"}
    while edges:
        leaves = [name for name, others in edges.items() if not others & edges.keys()]
        assert leaves, f"in circles: {sorted(edges)}"
        for name in leaves:
            del edges[name]
