"""The task a run config asks for: one of the table's, or one's own, with its overrides."""

from collections.abc import Sequence
from dataclasses import replace

from hosl_flower.config.groups.task import DEFAULT_LENGTH, TaskKeys
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.known_images import IMAGE_TASKS, image_task
from hosl_flower.tasks.labels import same_labels
from hosl_flower.tasks.task import Task


def task_from_config(config: RunConfig) -> Task:
    """The task a run asks for, with its overrides; ConfigError when it is incomplete."""
    keys = config.task
    base, (names, words) = TASKS.get(keys.name), _labels_and_words(keys)
    if keys.name in IMAGE_TASKS or keys.image_column:
        return _image_task(keys, names, words)
    if base is None:
        if not (keys.prompt and (words or keys.target_column)):
            raise ConfigError(
                f"task = {keys.name!r} is none of {', '.join((*TASKS, *IMAGE_TASKS))}; a task of "
                "your own needs data-path, in the run config: with columns text and label, of "
                "words, that is enough; or each node's own, and prompt and verbalizers; or "
                "target-column instead of verbalizers, or image-column instead of prompt"
            )
        base = Task(keys.name, keys.prompt, words)
    if base.target and (words or keys.label_column):
        raise ConfigError(
            f"task {base.name} generates its answers: verbalizers and label-column have no use"
        )
    task = replace(
        base,
        prompt=keys.prompt or base.prompt,
        label_column=keys.label_column or base.label_column,
        target=keys.target_column or base.target,
    )
    if task.target:
        task = replace(task, verbalizers=(), label_names=())
        task = task if task.cut in task.fields else replace(task, cut="")
    else:
        names, words = names or base.label_names, words or base.verbalizers
        task = replace(task, verbalizers=words, label_names=names)
    _check_used(keys, task)
    if not task.fields:
        raise ConfigError(
            f"prompt = {task.prompt!r} names no column; write one like {{text}}, in single braces"
        )
    if task.label_names and len(task.label_names) != len(task.verbalizers):
        raise ConfigError(
            f"verbalizers: task {task.name} has {len(task.label_names)} labels "
            f"({', '.join(task.label_names)}), got {len(task.verbalizers)} words"
        )
    return task


def _check_used(keys: TaskKeys, task: Task) -> None:
    """A value that would change nothing of a task about text is a mistake."""
    if keys.image_size:
        raise ConfigError(f"image-size has no use: task {task.name} is not about images")
    if _writes(keys) and not task.target:
        raise ConfigError(f"max-new-tokens has no use: task {task.name} generates no answers")


def _image_task(keys: TaskKeys, names: tuple[str, ...], words: tuple[str, ...]) -> Task:
    """A task about images; verbalizers are the classes, under the names the data has for them."""
    unused = {"prompt": keys.prompt, "max-length": keys.max_length != DEFAULT_LENGTH}
    unused |= {"target-column": bool(keys.target_column), "max-new-tokens": _writes(keys)}
    if idle := [key for key, is_set in unused.items() if is_set]:
        raise ConfigError(f"task = {keys.name!r} is about images: it has no {', '.join(idle)}")
    base = IMAGE_TASKS.get(keys.name)
    if base is None:
        if not words:
            raise ConfigError(
                f"task = {keys.name!r} is about images, by its image-column: it needs "
                "verbalizers too, the names of the classes, or data-path, in the run config"
            )
        base = image_task(keys.name, words, keys.image_column)
    elif words and len(words) != len(base.verbalizers):
        raise ConfigError(
            f"verbalizers: task {base.name} has {len(base.verbalizers)} classes, got {len(words)}"
        )
    _check_distinct(words)
    return replace(
        base,
        verbalizers=words or base.verbalizers,
        label_names=names or base.label_names,
        image=keys.image_column or base.image,
        label_column=keys.label_column or base.label_column,
    )


def _writes(keys: TaskKeys) -> bool:
    """Whether the length of generated answers is set."""
    return keys.max_new_tokens != TaskKeys.model_fields["max_new_tokens"].default


def _labels_and_words(keys: TaskKeys) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The label names and answer words of `verbalizers`: "bad,good" or "neg=bad,pos=good"."""
    pairs = [item.partition("=") for item in keys.verbalizer_list]
    if not any(equals for _, equals, _ in pairs):
        return (), tuple(keys.verbalizer_list)
    names = tuple(name.strip() for name, _, _ in pairs)
    words = tuple(word.strip() for _, _, word in pairs)
    if not all(names) or not all(words):
        raise ConfigError(
            f"verbalizers = {keys.verbalizers!r}: expected a word for every label, or "
            "label=word for every label of the data, each label once"
        )
    _check_distinct(names)
    return tuple(name.lower() for name in names), words


def _check_distinct(names: Sequence[str]) -> None:
    """ConfigError when two labels are one to parse_label."""
    if same := same_labels(names):
        raise ConfigError(
            f"verbalizers: {same[0]!r} and {same[1]!r} are one label: labels are matched whatever "
            "their case, spaces and form of Unicode; give each label once"
        )
