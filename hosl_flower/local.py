"""Local zeroth-order steps of a client on its own surrogate (HO-SFL; HO-FL's E)."""

from collections.abc import Callable

import torch
from torch import Tensor

from hosl_flower.messages import CutGradient, LocalTrain
from hosl_flower.state import ClientState
from hosl_flower.surrogate import Cotangent, Pieces, linear
from hosl_flower.zo import Point, estimate


def local_steps(
    state: ClientState,
    pieces: Callable[[Point], Pieces],
    gradient: Cotangent,
    anchor: float | None,
    request: CutGradient,
) -> tuple[list[list[float]], Tensor | None]:
    """Scalars [E][P] of E local steps, and for LocalTrain the change of the weights [n].

    pieces: activations at a point around the weights as they are. anchor: <lambda, z> of the
    clean activations at the start, where they are still known.
    The cut gradient stays that of the anchor; between the steps the client moves by its own
    scalars, and at the end it is back where it was, bit for bit. That takes a copy of the
    trainable weights, which a single step (E = 1) without LocalTrain does without.
    """
    train = isinstance(request, LocalTrain)
    steps = request.local_seeds
    start = state.snapshot() if train or len(steps) > 1 else None
    scalars: list[list[float]] = []
    change = None
    try:
        for number, seeds in enumerate(steps):
            surrogate = linear(pieces, gradient, None if number else anchor)
            scalars.append(estimate(surrogate, seeds, request.epsilon, two_sided=False))
            if train or number + 1 < len(steps):
                state.update(seeds, scalars[-1], request.learning_rate)
        if train and start is not None:
            change = state.weights().to(torch.float32) - start.weights.to(torch.float32)
    finally:
        if start is not None:
            state.roll_back(start)
    return scalars, change
