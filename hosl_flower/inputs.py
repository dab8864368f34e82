"""What stands between a task's examples and a model, of text or images, which the model decides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.families import InitStd, family_of
from hosl_flower.spec import ClientSpec
from hosl_flower.split import Base
from hosl_flower.tasks import Encoder, Inputs, load_tokenizer
from hosl_flower.weights import RandomWeights, WeightSource


class _FreshHead:
    """A checkpoint but for its head, which is made."""

    def __init__(self, source: WeightSource, head: str, seed: int, std: InitStd):
        self.source, self.origin = source, source.origin
        self._names = f"{head.rpartition('.')[0]}."
        self._head = RandomWeights(seed, std)

    def __contains__(self, name: str) -> bool:
        return name.startswith(self._names) or name in self.source

    def fill(self, name: str, out: Tensor) -> None:
        source = self._head if name.startswith(self._names) else self.source
        source.fill(name, out)

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        source = self._head if name.startswith(self._names) else self.source
        return source.rows(name, shape, rows)


def make_inputs(spec: ClientSpec, model: str, config: PretrainedConfig) -> Inputs:
    """The inputs of a run's task for a model, by its configuration. ConfigError when the one is
    about images and the other is not, or labels cannot stay on clients."""
    modality = family_of(config).modality
    if (modality == "image") != bool(spec.task.image):
        about = "images" if spec.task.image else "text"
        raise ConfigError(
            f"task {spec.task.name} is about {about}, {model} is a model of {modality} "
            f"({config.model_type}): choose another model or task"
        )
    if spec.labels == "client" and (spec.task.image or spec.task.target):
        about = "images" if spec.task.image else "answers that are generated"
        raise ConfigError(
            f"labels = client is for choices among answer words, task {spec.task.name} is about "
            f"{about}; use labels = server"
        )
    if modality == "text":
        return Encoder(spec.task, load_tokenizer(model), spec.max_length, spec.max_new_tokens)
    from hosl_flower.image_inputs import ImageInputs, load_image_processor  # brings Pillow

    processor = load_image_processor(model, config, spec.image_size)
    return ImageInputs(spec.task, processor, config, spec.cut_layer)


def load_processor(model: str, config: PretrainedConfig) -> Any:
    """What is saved with a model besides its weights: tokenizer or image processor. model: a
    directory that has it, which may be one of adapters. config: the model's."""
    if family_of(config).modality == "text":
        return load_tokenizer(model)
    from hosl_flower.image_inputs import load_image_processor

    return load_image_processor(model, config)


def with_classes(base: Base, names: Sequence[str], seed: int) -> tuple[Base, bool]:
    """A base whose head has a row for each class, and whether that is a fresh one: by `seed` it is,
    unless the checkpoint has a head for as many. A language model stays as it is."""
    family = family_of(base.config)
    if family.modality == "text":
        return base, False
    config = type(base.config).from_dict(base.config.to_dict())
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    fresh = family.head not in base.source or base.config.num_labels != len(names)
    source: WeightSource = base.source
    if fresh:
        source = _FreshHead(source, family.head, seed, family.init_std(config))
    return replace(base, config=config, source=source), fresh
