"""The figure that an evaluation or a run is known by."""

from collections.abc import Mapping
from typing import Any


def headline(values: Mapping[str, Any]) -> tuple[str, float]:
    """Its name and value, of a line of metrics.jsonl or of results.json: accuracy, or F1 where
    answers are generated."""
    name = "accuracy" if values.get("accuracy") is not None else "f1"
    return name, values[name]
