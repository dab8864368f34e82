"""A task of one's own that a file of texts and labels says enough about.

With a new name as task or none, and nothing said of it but data-path, the prompt is the column text
and the labels are words that answer for themselves. Without task and data-path it is what comes
with the package. What was read of the data becomes keys of the run config, so that it reaches
clients, run directory and model card like any other.
"""

from pathlib import Path

from hosl_flower.config import RunConfig, parse_config
from hosl_flower.errors import ConfigError, DataError
from hosl_flower.image_tasks import IMAGE_TASKS
from hosl_flower.task_table import BUNDLED_TASK, TASKS, Task

_PROMPT = "{text}"
_OWN = "own"  # the name of what data-path holds, where it is given none
_MOST = 50  # labels: more are no labels


def completed(config: RunConfig) -> RunConfig:
    """The configuration with a name of the task, and with prompt and verbalizers where it leaves
    them open and the training data that the server can read have them.

    Labels that stay on the clients are not read, nor data that each node has of its own: then
    ConfigError says what is to be given. Raises DataError for data that do not say enough.
    """
    if not config.task:
        config = _with(config, task=_OWN if config.data_path else BUNDLED_TASK)
    known = config.task in TASKS or config.task in IMAGE_TASKS
    if known or config.image_column or not config.data_path:
        return config
    config = _with(config, prompt=config.prompt or _PROMPT)
    if config.verbalizers or config.target_column:
        return config
    if config.labels == "client":
        raise ConfigError("labels = client: the server reads no labels, so set verbalizers")
    named = config.data_path.startswith(("hub:", "bundled:"))
    if not named and not Path(config.data_path).expanduser().exists():
        raise ConfigError(
            f"data-path = {config.data_path!r} does not exist here, on the server; if each node "
            "has data of its own, set verbalizers (and prompt)"
        )
    task = Task(config.task, config.prompt, label_column=config.label_column or "label")
    words = _words(config.data_path, task)
    return _with(config, verbalizers=",".join(f"{name}={word}" for name, word in words.items()))


def _with(config: RunConfig, **keys: str) -> RunConfig:
    return parse_config({**config.as_keys(), **keys})


def _words(source: str, task: Task) -> dict[str, str]:
    """Each label of the training data and its word, in alphabetical order."""
    from datasets import ClassLabel

    from hosl_flower.columns import find_column
    from hosl_flower.data import training_part  # needs seconds

    data = training_part(source, task)
    column = find_column(data, task.label_column, task, source)
    if column is None:
        raise DataError(
            f"{source} has no column {task.label_column!r}; it has {', '.join(data.column_names)}: "
            "set label-column, and prompt, as in prompt={text}"
        )
    name, values = column
    feature = data.features.get(name)
    if isinstance(feature, ClassLabel) and feature.names:
        values = [feature.int2str(value) for value in values if value is not None and value >= 0]
    empty = next((n for n, v in enumerate(values, 1) if v is None or not str(v).strip()), 0)
    if empty:
        raise DataError(f"{source}, row {empty}: {name} is missing; remove the row or label it")
    words = {word.lower(): word for word in sorted({str(value).strip() for value in values})}
    found, of = f"{source}: column {name!r}", ", ".join(list(words.values())[:4])
    if not 2 <= len(words) <= _MOST:
        many = f"has {len(words)} different labels ({of}{', ...' if len(words) > 4 else ''})"
        raise DataError(f"{found} {many}, expected 2 to {_MOST}; is it the labels' column?")
    if any(map(_is_number, words)):
        raise DataError(
            f"{found} has numbers ({of}): say in verbalizers which answer each has, in their "
            "order, as in verbalizers=bad,good"
        )
    if any(set(word) & set(",=") for word in words):
        raise DataError(f"{found}: labels ({of}) with , or = cannot be answers; rename them")
    return dict(sorted(words.items()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
