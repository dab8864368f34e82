"""How the scalars of a client's auxiliary head are found, one local step after the other: as they
are (HERON-SFL, DeComFL), or differentially private (privacy/dp_scalars.py)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hosl_flower.client.forwards import Forwards
from hosl_flower.client.local_steps import Estimator
from hosl_flower.models.batch import Batch
from hosl_flower.privacy.dp_scalars import Mechanism, example_gradients
from hosl_flower.protocol.messages.scalars import HeadProbe
from hosl_flower.zo.estimator import estimate
from hosl_flower.zo.surrogates import head_loss


class Batches(NamedTuple):
    """Of a request's local steps, by their number. repeated: places of examples that are in a
    mini-batch before."""

    batch: Callable[[int], Batch]
    repeated: Callable[[int], list[int]]


def plain(
    forwards: Forwards, request: HeadProbe, batches: Batches, note: Callable[[float], object]
) -> Estimator:
    """note: is told the loss before each step."""

    def scalars(step: int, seeds: Sequence[int]) -> list[float]:
        batch = batches.batch(step)
        surrogate = head_loss(lambda p: forwards.losses(batch, p), note)
        return estimate(surrogate, seeds, request.epsilon, two_sided=False)

    return scalars


def private(
    forwards: Forwards, request: HeadProbe, batches: Batches, mechanism: Mechanism
) -> Estimator:
    """batches: of one shape, whatever is in them."""

    def scalars(step: int, seeds: Sequence[int]) -> list[float]:
        batch = batches.batch(step)
        found = example_gradients(lambda p: forwards.losses(batch, p), seeds, request.epsilon)
        for place in batches.repeated(step):
            found[place] = [0.0] * len(seeds)  # an example counts once
        return mechanism.release(found, {**vars(request), "local_step": step})

    return scalars
