"""Local zeroth-order steps of a client on its own surrogate (HO-SFL, HERON-SFL; HO-FL's E)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.scalars import LocalProbe, LocalTrain

# Projected gradients [P] of a local step, by its number, along the directions of seeds [P].
Estimator = Callable[[int, Sequence[int]], list[float]]


def local_steps(
    state: ClientState, estimator: Estimator, request: LocalProbe
) -> tuple[list[list[float]], Tensor | None]:
    """Scalars [E][P] of E local steps, and for LocalTrain the change of the weights [n].

    estimator: of each local step, around the weights as they are then.
    Between the steps the client moves by its own scalars, and at the end it is back where it was,
    bit for bit. That takes a copy of the trainable weights, which a single step (E = 1) without
    LocalTrain does without.
    """
    train = isinstance(request, LocalTrain)
    steps = request.local_seeds
    start = state.snapshot() if train or len(steps) > 1 else None
    scalars: list[list[float]] = []
    change = None
    try:
        for number, seeds in enumerate(steps):
            scalars.append(estimator(number, seeds))
            if train or number + 1 < len(steps):
                state.update(state.seeded(seeds, scalars[-1]), request.learning_rate)
        if train and start is not None:
            change = state.weights().to(torch.float32) - start.weights.to(torch.float32)
    finally:
        if start is not None:
            state.roll_back(start)
    return scalars, change
