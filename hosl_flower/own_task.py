"""A task of one's own that a file of texts and labels says enough about.

With a new name as task or none, and nothing said of it but data-path, the prompt is the column text
and the labels are words that answer for themselves. Without task and data-path it is what comes
with the package. What was read of the data becomes keys of the run config, so that it reaches
clients, run directory and model card like any other.
"""

from pathlib import Path
from typing import Any

from hosl_flower.config import RunConfig, parse_config
from hosl_flower.image_tasks import IMAGE_TASKS
from hosl_flower.task_table import BUNDLED, TASKS, Task

_PROMPT = "{text}"
_OWN = "own"  # the name of what data-path holds, where it is given none
_MOST = 50  # labels: more are no labels


def completed(config: RunConfig) -> RunConfig:
    """The configuration with a name of the task, and with prompt and verbalizers where it leaves
    them open and the training data that the server can read have them. Raises DataError for
    damaged data.

    Labels that stay on the clients are not read, nor data that each node has of its own.
    """
    if not config.task:
        config = parse_config({**config.as_keys(), "task": _OWN if config.data_path else BUNDLED})
    known = config.task in TASKS or config.task in IMAGE_TASKS
    said = bool(config.verbalizers or config.target_column or config.image_column)
    if known or said or config.labels == "client" or not config.data_path:
        return config
    path = Path(config.data_path).expanduser()
    if not path.exists():
        return config
    words = _words(path, Task(config.task, _PROMPT, label_column=config.label_column or "label"))
    if words is None:
        return config
    found = {"prompt": config.prompt or _PROMPT, "verbalizers": ",".join(words)}
    return parse_config({**config.as_keys(), **found})


def _words(path: Path, task: Task) -> list[str] | None:
    """label=word for each label of the training data, in alphabetical order; None where they are
    not a few words."""
    from hosl_flower.columns import find_column
    from hosl_flower.data import training_part  # needs seconds

    column = find_column(training_part(path, task), task.label_column, task)
    values: list[Any] = [] if column is None else column[1]
    if not all(isinstance(value, str) for value in values):
        return None
    words = {word.lower(): word for word in sorted({value.strip() for value in values})}
    plain = all(word and not set(word) & set(",=") and not _is_number(word) for word in words)
    if not plain or not 2 <= len(words) <= _MOST:
        return None
    return [f"{name}={word}" for name, word in sorted(words.items())]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
