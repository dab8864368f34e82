"""The task, and the examples it is trained and evaluated on."""

from typing import Annotated

from pydantic import Field, StringConstraints

from hosl_flower.config.groups.base import After, Group
from hosl_flower.config.text_values import split_words
from hosl_flower.config.value_types import Labels, Length, LocalPath, Natural, Positive

DEFAULT_LENGTH = 128  # of texts, in tokens


class TaskKeys(Group):
    """What is asked of the model, and how an example becomes its input."""

    name: str = Field(
        "sst2",
        alias="task",
        description="sst2, rte, cb, wsc, wic, boolq, ag-news, trec, sms-spam, squad, drop, of "
        "images cifar10, cifar100, mnist, fashion-mnist, digits, or a name of your own, for which "
        "a data-path with columns text and label, of words, is enough; empty is what data-path "
        "holds, or without one sms-spam, which is bundled",
    )
    # a newline at its end is part of a prompt
    prompt: Annotated[str, StringConstraints(strip_whitespace=False)] = Field(
        "",
        description="overrides the task's prompt, e.g. '{sentence} It was'; a column of the data "
        "is in braces, {{ and }} are braces as text",
    )
    verbalizers: str = Field(
        "",
        description="overrides the answer words, comma separated, in label order, or as "
        "label=word where labels are no numbers",
    )
    label_column: str = Field("", description="overrides the name of the label column")
    target_column: str = Field(
        "",
        description="instead of verbalizers: the column of the text that is to follow the prompt, "
        "which is generated, and scored by exact match and F1",
    )
    image_column: str = Field(
        "",
        description="of your own task about images: the column of the images, `image` in a folder "
        "of them; the classes are the verbalizers",
    )
    image_size: Natural = Field(
        0,
        description="height and width images are resized to, with the model's own mean and "
        "deviation; 0 leaves all to the model's own image processor",
    )
    fresh_head: bool = Field(
        False,
        description="of a classifier: start with a head by the seed, even where the checkpoint has "
        "one for as many classes, whose rows are otherwise matched by the names in its id2label",
    )
    labels: Labels = Field(
        "server",
        description="client: labels are not sent; the server sends its last hidden states, and "
        "each client, with the answer words' rows of the head, the loss gradient there",
    )
    max_length: Length = Field(
        DEFAULT_LENGTH,
        description="tokens per example, the answer's among them; longer texts are cut",
    )
    max_new_tokens: Positive = Field(
        50, description="tokens of a generated answer, at most; taken off max-length"
    )

    @property
    def verbalizer_list(self) -> list[str]:
        """The overriding answer words; empty when the task's own are used."""
        return list(split_words(self.verbalizers))


class DataKeys(Group):
    """The examples: where they are, and how many are used."""

    path: Annotated[LocalPath, After("task")] = Field(
        "",
        alias="data-path",
        description="local file or directory instead of the task's own data set",
    )
    train_examples: Natural = Field(0, description="use at most so many; 0 is all")
    held_out_examples: Natural = Field(
        0,
        description="hold out so many training examples, drawn by seed; 0 takes the source's own "
        "held-out part, or a fifth",
    )
    eval_examples: Natural = Field(0, description="held-out examples, at most; 0 is all")
