"""Images as the inputs of a model: transformers' own image processors resize, rescale and
normalise them. Nothing is random: there is no augmentation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from hosl_flower.data.readers.images import decode
from hosl_flower.errors import ConfigError
from hosl_flower.models.batch import Batch
from hosl_flower.models.families.images import IMAGE_FAMILIES, ImageFamily
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tasks.task import Task


class ImageInputs:
    """Images of a task as pixels [B, C, size, size]; see tasks.Inputs.

    processor: of the model. cut: where the model is cut, which decides how many positions S its
    activations have. answers: a class is what an answer word is in a language model.
    """

    def __init__(self, task: Task, processor: Any, config: PretrainedConfig, cut: int):
        self.task, self.processor = task, processor
        self.answers = AnswerWords([[label] for label in range(len(task.verbalizers))])
        self.channels: int = config.num_channels
        self.size = _output_size(processor)
        family: ImageFamily = IMAGE_FAMILIES[config.model_type]
        made_for = family.image_size(config)
        if made_for and made_for != self.size:
            raise ConfigError(
                f"image-size: this model is for images of {made_for} pixels, not {self.size}; "
                "leave it at 0, or set it to that"
            )
        self.length = self.shortest = family.sequence(config, cut, self.size)

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Decode and process examples that carry an integer "label"."""
        images = [decode(example[self.task.image], self.channels) for example in examples]
        made = self.processor(images, input_data_format="channels_last", return_tensors="np")
        pixels = np.asarray(made["pixel_values"], dtype=np.float32)
        wanted = (len(images), self.channels, self.size, self.size)
        if pixels.shape != wanted:
            raise ConfigError(
                f"the model's image processor makes {list(pixels.shape)} of the images, expected "
                f"{list(wanted)}; set image-size"
            )
        labels = torch.tensor([example["label"] for example in examples])
        return Batch(torch.from_numpy(pixels), self._mask(len(images)), labels)

    def largest(self, examples: int) -> Batch:
        """All mini-batches of so many examples are alike."""
        pixels = torch.zeros(examples, self.channels, self.size, self.size)
        return Batch(pixels, self._mask(examples), torch.zeros(examples, dtype=torch.int64))

    def _mask(self, examples: int) -> torch.Tensor:
        return torch.ones((examples, self.length), dtype=torch.int64)  # there is no padding

    def check(self, config: PretrainedConfig) -> None:
        """Was checked when this was made."""

    def by_length(self, data: Any) -> Any:
        """As it is."""
        return data


def _output_size(processor: Any) -> int:
    """Height and width of what a processor makes, which `collate` then checks."""
    size = processor.size
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    found = {size.get(name) for name in ("height", "width", "shortest_edge")} - {None}
    if len(found) != 1:
        raise ConfigError(f"the model's image processor makes no squares ({size}): set image-size")
    return int(found.pop())
