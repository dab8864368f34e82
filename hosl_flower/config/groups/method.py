"""What training methods are set by: directions, steps, aggregation and noise."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from hosl_flower.config.groups.base import After, Group
from hosl_flower.config.value_types import (
    Aggregation,
    Derivative,
    NotNegative,
    Perturbation,
    Positive,
)


class ZoKeys(Group):
    """Zeroth-order estimates: along which directions, and how."""

    directions: int = Field(
        1, ge=1, le=10_000, description="Q (HOSL, two-sided) or P (HO-SFL, one-sided) per step"
    )
    epsilon: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probe distance; 0 is what suits dtype: 0.003 for bfloat16, else 0.001",
    )
    derivative: Derivative = Field(
        "differences",
        description="how HO-SFL's clients find their scalars: by probes at epsilon, or exactly by "
        "forward-mode differentiation, in twice a probe's time and memory of activations",
    )
    perturbation: Perturbation = Field("rank1", description="distribution of the directions")
    client_seeds: Literal["shared", "per-client"] = Field(
        "shared", description="per-client: K * P different directions per step (HO-SFL)"
    )

    @field_validator("epsilon", mode="after")
    @classmethod
    def _check_epsilon(cls, value: float) -> float:
        if 0 < value < 1e-6:
            raise ValueError("input should be 0, or greater than or equal to 1e-06")
        return value

    @property
    def probe_distance(self) -> float:
        """epsilon, or 0 where the derivative is taken itself."""
        return self.epsilon if self.derivative == "differences" else 0.0


class PaceKeys(Group):
    """How much is done between two exchanges."""

    turn_steps: Annotated[Positive, After("min-partition-size")] = Field(
        1, description="steps a client takes before the next one's turn (HOSL relay)"
    )
    local_steps: int = Field(
        1,
        ge=1,
        le=10_000,
        description="E, client updates between aggregations (HO-SFL, FedAvg, split FO, HERON)",
    )
    upload_every: Positive = Field(1, description="k, steps between uploads of activations (HERON)")
    steps_per_message: Positive = Field(
        1,
        description="S, steps whose client work is asked at once: more spare Flower messages, but "
        "all S use the client weights before the first; 1 is exact",
    )


class AggregationKeys(Group):
    """One scalar of what the clients found."""

    rule: Aggregation = Field(
        "weighted-mean",
        alias="aggregation",
        description="of the clients' scalars; weights are numbers of examples",
    )
    trim_fraction: float = Field(
        0.2, ge=0, lt=0.5, description="of trimmed-mean: share of clients left out at each end"
    )
    scalar_clip: float = Field(
        0.0,
        ge=0,
        le=1e12,
        description="C: each of a client's scalars is bounded to +-C before it counts, so that one "
        "client moves the model at most so far; 0 is off",
    )


class PrivacyKeys(Group):
    """Noise in what clients send."""

    activation_noise: NotNegative = Field(
        0.0,
        description="each client adds Gaussian noise to the activations it sends, of so many times "
        "a token's root mean square; what that hides is measured, not promised. 0 is off",
    )
    dp_noise: NotNegative = Field(
        0.0,
        description="z, for full ZO: each client adds Gaussian noise of z * dp-clip to the sum "
        "over its mini-batch before a scalar leaves it; the run says what epsilon that is. 0 is "
        "off",
    )
    dp_clip: NotNegative = Field(
        0.0,
        description="C: one example's projected gradients along a step's directions are bounded to "
        "an L2 norm of C",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=0.1, description="delta that epsilon is for; below 1 / examples of a client"
    )
