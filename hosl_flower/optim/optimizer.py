"""The client's optimizer: from a gradient to new weights.

A ledger entry gives the client's gradient estimate, g = sum_q scalars[q] * s(seeds[q]); the
optimizer turns it into an update. Its state follows from the entries applied, so replaying
a ledger rebuilds it, and a snapshot carries it (ledger/client_state.py). A gradient of any other
kind that is a sum of terms will do too (gradient.py).

    sgd    theta <- theta - eta g                                (HOSL Alg. 3; no state)
    adamw  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2     (HO-SFL; 2 values per element)
           theta <- theta - eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    adafactor  of computed gradients only, with almost no state (adafactor.py)

adamw has no weight decay, betas (0.9, 0.999) and eps 1e-8, and computes in float32. Each line
is made of single IEEE operations on float32 (no fused multiply-add), in a fixed order, so with
sign directions a replay gives the same bits on every device. 16-bit parameters are widened, updated
and rounded once, at random, so that steps smaller than their spacing add up (tensors/rounding.py).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hosl_flower.optim.gradient import Gradient, Term
from hosl_flower.tensors.rounding import store, to_float32
from hosl_flower.tensors.rows import matrix_of, row_chunks

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8

Terms = Sequence[tuple[float, Term]]


class Optimizer(ABC):
    """What the state of a client submodel asks of its optimizer. An update is `begin`, then `move`
    for each parameter, in any order."""

    steps = 0  # updates begun

    def begin(self) -> None:
        """Of one update of some or all parameters."""
        self.steps += 1

    @abstractmethod
    def move(
        self, name: str, parameter: Tensor, terms: Terms, learning_rate: float, seed: int
    ) -> None:
        """Update one parameter in place along the sum of scalar times term. seed: of the random
        rounding of 16-bit parameters."""

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Gradient, learning_rate: float
    ) -> None:
        """One update of all parameters, in place."""
        self.begin()
        terms = gradient.terms(_device(parameters))
        for name, parameter in parameters.items():
            self.move(name, parameter, terms, learning_rate, gradient.rounding_seed)

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The state, tensor by tensor."""

    @abstractmethod
    def save(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """State as float32 [k, m] (`state_shape`), in the order of the parameters; empty when there
        is none."""

    @abstractmethod
    def load(self, moments: Tensor, steps: int, parameters: Mapping[str, Tensor]) -> None:
        """State as `save` gave it, after `steps` updates; empty moments are a fresh start."""


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device if parameters else torch.device("cpu")


class Sgd(Optimizer):
    """theta -= learning_rate * sum_q scalars[q] * term_q. No gradient buffer.

    A chunk of rows of one parameter is updated by all terms in turn. Each coefficient is
    rounded to float32 first, then added in the order given; a 16-bit parameter is rounded
    once, at the end, at random (tensors/rounding.py).
    """

    @torch.no_grad()
    def move(
        self, name: str, parameter: Tensor, terms: Terms, learning_rate: float, seed: int
    ) -> None:
        rated = [(to_float32(learning_rate * scalar), term) for scalar, term in terms]
        for start, block in row_chunks(matrix_of(parameter)):
            work = block if block.dtype == torch.float32 else block.float()
            for coefficient, term in rated:
                term.subtract_(work, name, start, coefficient)
            if work is not block:
                store(block, work, seed, name, start)

    def tensors(self) -> list[Tensor]:
        return []

    def save(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.empty((0, 0))

    def load(self, moments: Tensor, steps: int, parameters: Mapping[str, Tensor]) -> None:
        self.steps = steps


class AdamW(Optimizer):
    """Adam on the gradient, a chunk of rows at a time: no gradient buffer of its own, two moments
    per element."""

    def __init__(self) -> None:
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # float32, in parameter shape

    @torch.no_grad()
    def move(
        self, name: str, parameter: Tensor, terms: Terms, learning_rate: float, seed: int
    ) -> None:
        rate = learning_rate / (1 - _BETA1**self.steps)
        spread = 1 / math.sqrt(1 - _BETA2**self.steps)
        m, v = (matrix_of(moment) for moment in self._moments(name, parameter))
        for start, block in row_chunks(matrix_of(parameter)):
            rows = slice(start, start + block.shape[0])
            g = torch.zeros_like(block, dtype=torch.float32)
            for scalar, term in terms:
                term.subtract_(g, name, start, -scalar)
            m[rows].mul_(_BETA1).add_(g.mul(1 - _BETA1))
            v[rows].mul_(_BETA2).add_(g.mul_(g).mul_(1 - _BETA2))
            scale = square_root(v[rows]).mul_(spread).add_(_EPSILON)
            work = block if block.dtype == torch.float32 else block.float()
            work.sub_(m[rows].mul(rate).div_(scale))
            if work is not block:
                store(block, work, seed, name, start)

    def _moments(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.moments:
            first, second = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
            self.moments[name] = first.detach(), second.detach()
        return self.moments[name]

    def tensors(self) -> list[Tensor]:
        return [moment for pair in self.moments.values() for moment in pair]

    def save(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if not self.moments:
            return torch.empty((0, 0))
        pairs = [self._moments(name, parameter) for name, parameter in parameters.items()]
        return torch.stack([torch.cat([p[i].reshape(-1) for p in pairs]).cpu() for i in range(2)])

    def load(self, moments: Tensor, steps: int, parameters: Mapping[str, Tensor]) -> None:
        self.steps = steps if moments.numel() else 0
        self.moments = {}
        start = 0
        for name, parameter in parameters.items() if moments.numel() else ():
            stop = start + parameter.numel()
            own = moments[:, start:stop].to(parameter.device, copy=True)
            self.moments[name] = (own[0].view(parameter.shape), own[1].view(parameter.shape))
            start = stop


def square_root(values: Tensor) -> Tensor:
    """Float32 square roots, correctly rounded, as IEEE 754 says and as CUDA's are. torch's on a CPU
    are MKL's, of which a fifth differ from that in the last bit, others on other processors.
    """
    if values.is_cuda or type(values) is not Tensor:  # no data: tensors/shapes_only.py
        return values.sqrt()
    return torch.from_numpy(np.sqrt(values.cpu().numpy())).to(values.device)
