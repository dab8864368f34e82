"""The registered methods and the run-config keys they declare, without importing a method.

Importing a method imports torch, which takes seconds. So keys are read from a method's source,
where they are a literal set, or the keys of another method with some added or removed.
"""

import ast
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from hosl_flower.errors import ConfigError

GROUP = "hosl_flower.strategies"  # the entry points under which packages register methods


def place_of(reference: str) -> str:
    """Return the "module:class" of a method, the same for every way to write its name.

    Raises:
        ConfigError: if no package has registered the name.
    """
    if ":" in reference:
        return reference
    known = registered()
    if reference not in known:
        raise ConfigError(
            f"strategy = {reference!r}: no such method; expected one of "
            f"{', '.join(sorted(known))}, or 'module:class' of an installed package"
        )
    return known[reference].value


@cache
def registered() -> dict[str, EntryPoint]:
    """Return the methods that installed packages have registered, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def used_by() -> dict[str, list[str]]:
    """Return the names of the registered methods that declare a key, by key."""
    found: dict[str, list[str]] = {}
    for name in sorted(registered()):
        for key in declared_keys(place_of(name)):
            found.setdefault(key, []).append(name)
    return found


@cache
def declared_keys(place: str) -> frozenset[str]:
    """Return the keys that a method declares, or nothing where its source is not so simple.

    Args:
        place: "module:class".
    """
    module, _, name = place.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(str(spec.origin if spec else "")).read_text(encoding="utf-8"))
        return _of_class(tree, module, name)
    except (ImportError, OSError, SyntaxError, ValueError, LookupError):
        return frozenset()


def _of_class(tree: ast.Module, module: str, name: str) -> frozenset[str]:
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return declared_keys(_imported(tree, name))
    for node in classes[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "keys":
            return _value(tree, module, node.value)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "keys" and node.value:
            return _value(tree, module, node.value)
    bases = classes[name].bases
    return _of_class(tree, module, ast.unparse(bases[0])) if bases else frozenset()


def _imported(tree: ast.Module, name: str) -> str:
    """The "module:class" of a class that is imported by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return f"{node.module}:{alias.name}"
    raise LookupError(name)


def _value(tree: ast.Module, module: str, node: ast.expr) -> frozenset[str]:
    """The set that an expression gives."""
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return _value(tree, module, left) | _value(tree, module, right)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(tree, module, left) - _value(tree, module, right)
        case ast.Attribute(ast.Name(owner), "keys"):
            return _of_class(tree, module, owner)
        case ast.Call(ast.Name("frozenset"), arguments):
            return frozenset(ast.literal_eval(arguments[0])) if arguments else frozenset()
    return frozenset(ast.literal_eval(node))
