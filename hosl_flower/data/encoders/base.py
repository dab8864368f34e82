"""What turns a task's examples into what a model is fed."""

from collections.abc import Sequence
from typing import Any, Protocol

from hosl_flower.models.batch import Batch
from hosl_flower.tasks.scoring import Scoring
from hosl_flower.tasks.task import Task


class ExampleEncoder(Protocol):
    """What is between the examples of a task and a model: a prompt's token ids here, a classifier's
    in classifier_text.py, pixels in images.py.

    answers: how scores of the labels come about. processor: of transformers, saved with a model.
    length, shortest: most and fewest positions S of an example's activations.
    """

    task: Task
    length: int

    @property
    def answers(self) -> Scoring: ...

    @property
    def shortest(self) -> int: ...

    @property
    def processor(self) -> Any: ...

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """A mini-batch of examples that carry an integer "label"."""

    def largest(self, examples: int) -> Batch:
        """The largest mini-batch of so many examples there can be; of any content."""

    def check(self, config: Any) -> None:
        """ModelError unless the model of this configuration can take these inputs."""

    def by_length(self, data: Any) -> Any:
        """A data set in an order in which there is little padding."""


def by_length(data: Any, fields: Sequence[str]) -> Any:
    """A data set with like lengths of its texts together: fewer padding tokens to forward, the same
    metrics."""
    columns = [data[name][:] for name in fields]
    lengths = [sum(map(len, texts)) for texts in zip(*columns, strict=True)]
    return data.select(sorted(range(len(lengths)), key=lengths.__getitem__))
