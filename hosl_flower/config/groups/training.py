"""The two halves of the model: what is trained of each, and by which optimizer."""

from typing import Annotated

from pydantic import Field

from hosl_flower.config.groups.base import After, Group, keys_begin_with
from hosl_flower.config.value_types import (
    ClientGradient,
    ClientOptimizer,
    Natural,
    NotNegative,
    Optimizer,
    Quantization,
    Schedule,
    Trainable,
)


class ClientKeys(Group):
    """The client half, the same on every client."""

    model_config = keys_begin_with("client-")

    trainable: Trainable = Field(
        "full",
        description="full trains embeddings too (as HOSL), blocks freezes them, "
        "lora trains adapters only",
    )
    quantization: Quantization = Field(
        "none",
        description="int8 keeps the client's frozen matrices in 8 bits, adapters in float32; "
        "needs client-trainable = lora and hosl-flower[quant]",
    )
    gradient: ClientGradient = Field(
        "backprop",
        description="split FO: back-propagation, the same block by block with autograd (recompute) "
        "or without (exact), or residual feedback: in a forward pass, each block by itself",
    )
    optimizer: ClientOptimizer = Field(
        "sgd",
        description="of the client's gradient; adamw without weight decay; for split FO adafactor, "
        "with almost no state, and adafactor-momentum, with an eighth of adamw's, a quarter where "
        "embeddings are trained",
    )
    learning_rate: float = Field(1e-6, ge=0, le=1e3, description="of the client's optimizer")
    micro_batch: Annotated[Natural, After("server-micro-batch")] = Field(
        0,
        description="sequences the client runs at a time, with less memory; 0 is a whole batch, "
        "for recompute some 2,000 tokens, for exact 256, for residual 128. HO-SFL then takes one "
        "forward more per step",
    )


class ServerKeys(Group):
    """The server half."""

    model_config = keys_begin_with("server-")

    trainable: Trainable = Field(
        "full",
        description="full trains final norm and answer words too (not these with labels = client), "
        "blocks or lora as above",
    )
    optimizer: Optimizer = Field("sgd", description="adamw without weight decay")
    learning_rate: float = Field(1e-3, ge=0, le=1e3, description="of the server's optimizer")
    gradient_clip: Annotated[NotNegative, After("warmup-steps")] = Field(
        0.0,
        description="most that the norm of the server's gradient may be in a step: a larger one is "
        "scaled down to it; 0 is off",
    )
    micro_batch: Annotated[Natural, After("server-gradient-clip")] = Field(
        0, description="sequences the server back-propagates at a time; 0 is all of a step"
    )
    steps: Annotated[int, After("local-steps")] = Field(
        1, ge=1, le=10_000, description="tau, zeroth-order steps of the server per step (split ZO)"
    )


class LearningRateKeys(Group):
    """What becomes of both sides' learning rates over the steps."""

    schedule: Schedule = Field(
        "constant",
        alias="learning-rate-schedule",
        description="of both sides' learning rates: linear and cosine fall to zero over the steps",
    )
    warmup_steps: Natural = Field(
        0, description="steps over which both learning rates rise from zero first"
    )


class LoraKeys(Group):
    """The adapters of the half, or halves, that train such."""

    model_config = keys_begin_with("lora-")

    rank: int = Field(8, ge=1, le=4096, description="r of the adapters, on either side")
    alpha: float = Field(16.0, gt=0, le=1e6, description="adapters act as alpha / r * B A x")
    targets: str = Field("q_proj,v_proj", description="modules that get adapters, comma separated")
