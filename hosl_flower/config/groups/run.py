"""One run: its directory, its evaluations, and how long it waits."""

from typing import Literal

from pydantic import Field

from hosl_flower.config.groups.base import Group
from hosl_flower.config.text_values import split_words
from hosl_flower.config.value_types import DirectoryName, LocalPath, Natural, Positive


class EvaluationKeys(Group):
    """When and where the model is evaluated."""

    batch_size: Positive = Field(
        32, alias="eval-batch-size", description="examples per evaluation request"
    )
    every: Positive = Field(
        50, alias="eval-every", description="evaluate every so many steps, and at the end"
    )
    mode: Literal["split", "central"] = Field(
        "split",
        alias="evaluation",
        description="through the client, or on the server from base weights and ledger",
    )


class RunKeys(Group):
    """The run directory: where it is, what is written there, what is gone on from."""

    output_dir: LocalPath = Field(
        "runs", min_length=1, description="where run directories are made"
    )
    name: DirectoryName = Field(
        "",
        alias="run-name",
        description="the run directory's name; default: a time stamp",
    )
    checkpoint_every: Natural = Field(
        0, description="write a checkpoint every so many steps, to go on from; 0 never does"
    )
    checkpoints_kept: Positive = Field(
        2, description="how many of the latest checkpoints are kept; each is as large as the rest"
    )
    resume: LocalPath = Field(
        "",
        description="a run directory with a checkpoint: go on from it, in it; what decides the "
        "numbers must be as it was",
    )
    save_model: bool = Field(True, description="write the trained model at the end")
    save_format: Literal["merged", "adapters"] = Field(
        "merged", description="plain weights, or LoRA adapters in peft's format"
    )
    trackers: str = Field(
        "auto",
        description="where curves go besides the run directory: tensorboard, wandb, mlflow, "
        "several with commas; auto is tensorboard if it is installed, empty is none",
    )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The trackers asked for."""
        return split_words(self.trackers)


class DeadlineKeys(Group):
    """Seconds to wait for others."""

    nodes: float = Field(
        60.0,
        alias="nodes-deadline",
        gt=0,
        description="seconds to wait for enough SuperNodes at the start, and for each of them to "
        "load, its data too; for that reply-deadline if it is longer",
    )
    reply: float = Field(
        600.0,
        alias="reply-deadline",
        gt=0,
        description="seconds a client may take for one exchange",
    )
    step: float = Field(
        0.0,
        alias="step-deadline",
        ge=0,
        description="seconds a step waits for answers of its clients before it goes on with those "
        "it has, if they are min-clients; 0 is reply-deadline. Not for methods with one client at "
        "a time",
    )
