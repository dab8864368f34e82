"""The reference of the run-config keys: in sections, with types and allowed values."""

import json
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt

from hosl_flower.config.run_config import KEYS, Key

# titles, and the groups of RunConfig or keys outside groups that they hold
_SECTIONS: dict[str, tuple[str, ...]] = {
    "Method": ("strategy", "pace", "aggregation"),
    "Model": ("model", "cut-layer", "dtype", "lora"),
    "Task and data": ("task", "data", "offline-fallback"),
    "Clients": ("clients", "deadlines"),
    "Training": ("steps", "batch-size", "seed", "client", "server", "learning-rate"),
    "Zeroth-order estimates": ("zo",),
    "Evaluation": ("evaluation",),
    "Privacy": ("privacy",),
    "Communication": ("link", "codec", "update-codec", "stream"),
    "Output and machine": ("run", "device", "threads"),
}
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}
_UNBOUNDED = 2**31 - 1  # larger bounds only keep numbers within the machine's


def sections() -> dict[str, list[Key]]:
    """Return all keys, by the titles of their sections."""
    found = {
        title: [key for key in KEYS.values() if (key.group or key.name) in members]
        for title, members in _SECTIONS.items()
    }
    assert sum(map(len, found.values())) == len(KEYS), "a key has no section, or several"
    return found


def choices(key: Key) -> tuple[str, ...]:
    """Return the values that a key allows, or nothing where they are not a list."""
    return tuple(map(str, get_args(key.field.annotation)))


def kind(key: Key) -> str:
    """Return the type of a key's values and their range, such as "integer, 1 to 1024"."""
    if choices(key):
        return "one of"
    name = _TYPES[key.field.annotation]  # type: ignore[index]
    least, most = "", ""
    for mark in key.field.metadata:
        if isinstance(mark, Ge):
            least = f"{_number(mark.ge)}"
        elif isinstance(mark, Gt):
            least = f"> {_number(mark.gt)}"
        elif isinstance(mark, Le) and _is_bound(mark.le):
            most = f"{_number(mark.le)}"
        elif isinstance(mark, Lt) and _is_bound(mark.lt):
            most = f"< {_number(mark.lt)}"
    both = least and most and "<" not in most and ">" not in least
    if both:
        return f"{name}, {least} to {most}"
    limits = [least if ">" in least else f"≥ {least}"] if least else []
    limits += [most if "<" in most else f"≤ {most}"] if most else []
    return ", ".join([name, *limits])


def default(key: Key) -> str:
    """Return a key's default as TOML."""
    return json.dumps(key.field.default).replace("e-0", "e-")


def _is_bound(value: Any) -> bool:
    return value <= _UNBOUNDED


def _number(value: Any) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"
