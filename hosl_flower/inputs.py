"""What stands between a task's examples and a model, of text or images, which the model decides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.families import Family, InitStd, family_of
from hosl_flower.spec import ClientSpec
from hosl_flower.split import Base
from hosl_flower.task_table import Task
from hosl_flower.tasks import Encoder, Inputs, load_tokenizer
from hosl_flower.text_inputs import TextInputs
from hosl_flower.weights import RandomWeights, WeightSource


class _FreshHead:
    """A checkpoint but for its head, which is made, as is what else of its heads is missing."""

    def __init__(self, source: WeightSource, family: Family, seed: int, std: InitStd):
        self.source, self.origin = source, source.origin
        self._names, self._heads = f"{family.head.rpartition('.')[0]}.", family.heads
        self._made = RandomWeights(seed, std)

    def __contains__(self, name: str) -> bool:
        return name.startswith(self._heads) or name in self.source

    def _of(self, name: str) -> WeightSource:
        missing = name.startswith(self._heads) and name not in self.source
        return self._made if missing or name.startswith(self._names) else self.source

    def fill(self, name: str, out: Tensor) -> None:
        self._of(name).fill(name, out)

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        return self._of(name).rows(name, shape, rows)


def make_inputs(spec: ClientSpec, model: str, config: PretrainedConfig) -> Inputs:
    """The inputs of a run's task for a model, by its configuration. ConfigError when they do not
    fit each other, or labels cannot stay on clients."""
    _check_fit(spec, model, config)
    family = family_of(config)
    if family.modality == "text":
        tokenizer = load_tokenizer(model)
        if family.classes:
            return TextInputs(spec.task, tokenizer, config, spec.max_length)
        return Encoder(spec.task, tokenizer, spec.max_length, spec.max_new_tokens)
    from hosl_flower.image_inputs import ImageInputs, load_image_processor  # brings Pillow

    processor = load_image_processor(model, config, spec.image_size)
    return ImageInputs(spec.task, processor, config, spec.cut_layer)


def _check_fit(spec: ClientSpec, model: str, config: PretrainedConfig) -> None:
    task, family = spec.task, family_of(config)
    if (family.modality == "image") != bool(task.image):
        about = "images" if task.image else "text"
        raise ConfigError(
            f"task {task.name} is about {about}, {model} is a model of {family.modality} "
            f"({config.model_type}): choose another model or task"
        )
    if task.target and family.classes:
        raise ConfigError(
            f"the answers of task {task.name} are generated, {model} is a classifier "
            f"({config.model_type}): choose another model or task"
        )
    if spec.activation_noise and task.target:
        raise ConfigError(
            f"activation-noise is for choices among answer words and classes, the answers of task "
            f"{task.name} are generated"
        )
    if spec.labels == "client" and (family.classes or task.target):
        what = (
            f"task {task.name} is about {'images' if task.image else 'answers that are generated'}"
        )
        if family.classes and not task.image:
            what = f"{model} is a classifier ({config.model_type})"
        raise ConfigError(
            f"labels = client is for choices among answer words, {what}; use labels = server"
        )


def load_processor(model: str, config: PretrainedConfig) -> Any:
    """What is saved with a model besides its weights: tokenizer or image processor. model: a
    directory that has it, which may be one of adapters. config: the model's."""
    if family_of(config).modality == "text":
        return load_tokenizer(model)
    from hosl_flower.image_inputs import load_image_processor

    return load_image_processor(model, config)


def class_names(task: Task) -> tuple[str, ...]:
    """What the classes are called, by label: as in the data, not by the words that a language model
    answers with."""
    return task.verbalizers if task.image else task.label_names or task.verbalizers


def with_classes(base: Base, names: Sequence[str], seed: int) -> tuple[Base, bool]:
    """A base whose head has a row for each class, and whether that is a fresh one: by `seed` it is,
    unless the checkpoint has a head for as many. A language model stays as it is."""
    family = family_of(base.config)
    if not family.classes:
        return base, False
    config = type(base.config).from_dict(base.config.to_dict())
    config.id2label = dict(enumerate(names))
    config.problem_type = None  # a head of classes, whatever the checkpoint's was
    config.label2id = {name: label for label, name in enumerate(names)}
    fresh = family.head not in base.source or base.config.num_labels != len(names)
    source: WeightSource = base.source
    if fresh:
        source = _FreshHead(source, family, seed, family.init_std(config))
    return replace(base, config=config, source=source), fresh
