"""A task of one's own that a file of texts or images and labels says enough about.

With a new name as task or none, and nothing said of it but data-path, the prompt is the column text
and the labels are words that answer for themselves; of a classifier, whose classes need no words,
numbers too. Without task and data-path it is what comes with the package. What was read of the data
becomes keys of the run config, so that it reaches clients, run directory and model card like any
other.
"""

import logging
import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError, DataError, ModelError
from hosl_flower.tasks.known import BUNDLED_TASK, TASKS
from hosl_flower.tasks.known_images import IMAGE_TASKS, image_task
from hosl_flower.tasks.labels import MOST_LABELS, is_no_label, label_key, label_text, same_labels
from hosl_flower.tasks.task import Task

log = logging.getLogger("hosl_flower")

_PROMPT = "{text}"
_NO_PATHS = ("hub:", "bundled:")  # what data-path begins with that is none
_OWN = "own"  # the name of what data-path holds, where it is given none
_MANY = 50  # labels: more are not asked of a prompt, and of a classifier only where rows share them


def completed(config: RunConfig) -> RunConfig:
    """The configuration with a name of the task, and with prompt and verbalizers where it leaves
    them open and the data that the server can read have them.

    Labels that stay on the clients are not read, nor data that each node has of its own: then
    ConfigError says what is to be given. Raises DataError for data that do not say enough.
    """
    if not config.task.name:
        config = _with(config, task=_OWN if config.data.path else BUNDLED_TASK)
    known = config.task.name in TASKS or config.task.name in IMAGE_TASKS
    if known or not config.data.path:
        return config
    if not config.task.image_column:
        config = _with(config, prompt=config.task.prompt or _PROMPT)
    if config.task.verbalizers or config.task.target_column:
        return config
    if config.task.labels == "client":
        raise ConfigError("labels = client: the server reads no labels, so set verbalizers")
    named = config.data.path.startswith(_NO_PATHS)
    if not named and not Path(config.data.path).expanduser().exists():
        raise ConfigError(
            f"data-path = {config.data.path!r} does not exist here, on the server; if each node "
            "has data of its own, set verbalizers (and prompt)"
        )
    words = _words(config)
    return _with(config, verbalizers=",".join(f"{name}={word}" for name, word in words.items()))


def check_data_path(config: RunConfig) -> None:
    """Refuse a data-path that is not there, for a run whose clients are on this machine.

    Raises:
        ConfigError: where the task is to be read of the data.
        DataError: for any other task.
    """
    path = config.data.path
    if not path or path.startswith(_NO_PATHS) or os.path.exists(os.path.expanduser(path)):
        return
    completed(config)
    path = os.path.abspath(os.path.expanduser(path))
    raise DataError(f"data path {path!r} does not exist")


def _with(config: RunConfig, **keys: str) -> RunConfig:
    return parse_config({**config.as_keys(), **keys})


def _words(config: RunConfig) -> dict[str, str]:
    """Each label of the data and its word, in alphabetical order, or by number."""
    task = Task(
        config.task.name, config.task.prompt, label_column=config.task.label_column or "label"
    )
    if config.task.image_column:
        images = image_task(config.task.name, (), config.task.image_column)
        task = replace(images, label_column=task.label_column)
    found, labels = _labels(config, task)
    names = sorted({label for own in labels for label in own})
    words = {label_key(name): name for name in names}  # of several spellings the last
    of = ", ".join(list(words.values())[:4]) + ", ..." * (len(words) > 4)
    if not 2 <= len(words) <= MOST_LABELS or len(words) > max(_MANY, sum(map(len, labels)) // 2):
        raise DataError(
            f"{found} has {len(words)} different labels ({of}), expected 2 to {_MANY}, or up to "
            f"{MOST_LABELS} that two rows each have; is it the labels' column?"
        )
    if len(words) < len(names):
        log.warning(
            "%s: labels that differ only in case or form of Unicode are taken as one: %d spellings "
            "of %d labels", found, len(names), len(words),
        )  # fmt: skip
    if any(set(word) & set(",=") for word in words.values()):
        raise DataError(f"{found}: labels ({of}) with , or = cannot be answers; rename them")
    numbers = all(map(_is_number, words))
    if any(map(_is_number, words)) and not (numbers and _is_classifier(config)):
        raise DataError(
            f"{found} has numbers ({of}): say in verbalizers which answer each has, in their "
            "order, as in verbalizers=bad,good"
        )
    if numbers:
        return _numbered(list(words.values()), found)
    if len(words) > _MANY and not _is_classifier(config):
        raise ConfigError(
            f"{found} has {len(words)} different labels ({of}), too many to ask a language model "
            f"for without being told: set model to a classifier, such as distilbert-base-uncased, "
            "or verbalizers to an answer for each"
        )
    return {word.lower(): word for word in sorted(words.values(), key=str.lower)}


def _labels(config: RunConfig, task: Task) -> tuple[str, list[list[str]]]:
    """The column of the labels, for messages, and the labels of each part as they are written."""
    from hosl_flower.data.columns import find_column, suggestion
    from hosl_flower.data.sources import labelled_parts  # needs seconds

    found, labels = "", []
    parts = labelled_parts(config.data.path, task)
    for data in parts[:1] if config.data.held_out_examples else parts:
        column = find_column(data, task.label_column, task)
        if column is None:
            raise DataError(
                f"{data.where} has no column {task.label_column!r}; it has {data.listed}: set "
                f"label-column{'' if task.image else ', and prompt, as in prompt={text}'}"
                f"{suggestion(data.names, task.label_column)}{data.doubt}"
            )
        if len(data) == 0:
            raise DataError(f"{data.where} has no examples")
        name, values = column
        if classes := data.classes(name):
            if same := same_labels(classes):
                raise DataError(
                    f"{data.where}, column {name!r}: labels {same[0]!r} and {same[1]!r} differ "
                    "only in case, spaces or form of Unicode; rename one"
                )
            # those without a label, -1, are refused with their row when they are used
            numbers = [v for v in values if isinstance(v, int) and 0 <= v < len(classes)]
            values = [classes[v] for v in numbers] or values
        labels.append([_label(v, data.place(row), name) for row, v in enumerate(values)])
        found = found or f"{data.where}: column {name!r}"
    return found, labels


def _label(value: Any, place: str, column: str) -> str:
    text = label_text(value, f"{place}, column {column!r}")
    if is_no_label(text):
        raise DataError(f"{place}: {column} is missing; remove the row or label it")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(f"{place}: {column} has half a character (a surrogate alone); mend it")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _numbered(labels: list[str], found: str) -> dict[str, str]:
    """Classes that are numbers, from the lowest to the highest."""
    if not all(label.isascii() and label.isdigit() and len(label) < 10 for label in labels):
        raise DataError(
            f"{found} has numbers that are no labels: expected 0, 1, 2, ... or 1, 2, ...; set "
            "verbalizers, as in verbalizers=-1=negative,1=positive"
        )
    return {label: label for label in sorted(labels, key=int)}


def _is_classifier(config: RunConfig) -> bool:
    """Whether the model has a head of classes, which need no words."""
    if config.task.image_column:
        return True
    from hosl_flower.models.base_model import model_config
    from hosl_flower.models.families.registry import family_of

    try:
        return family_of(model_config(config.model)).classes
    except ModelError:  # it is said where the model is opened to be used
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
