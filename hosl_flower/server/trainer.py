"""What the server does with activations: losses on a frozen submodel, first-order steps,
scores. No Flower here. The server always computes in float32: optimizer steps are too small
for 16-bit weights, and it is not the side that is short of memory.

The loss is the cross-entropy over the answer words' scores (tasks/answer_words.py), or over the
tokens of answers that are generated (tasks/generated_answers.py). Of the LM head only the rows of
the answer words' tokens are trained (by server-trainable = full). Where each is one token no other
row ever gets a gradient: with SGD, or AdamW without weight decay, that is the same update as
training the whole head, without a vocabulary-sized gradient. For answers that are generated all
rows are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosl_flower.errors import ConfigError, DivergedError, UnusableBatchError
from hosl_flower.models.submodels import AUXILIARY, ServerSubmodel, trainable_parameters
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.server.losses import BatchPiece, LossSource, SentLabels
from hosl_flower.server.scores import Addable
from hosl_flower.tasks.scoring import Scoring
from hosl_flower.tensors.raw_bytes import LARGEST_LOSS, largest

ANSWERS = "answer_rows"  # the answer words' rows of the LM head, among the trained parameters

LARGEST_GRADIENT = 1e6  # of one value, of the mean loss of a client's batch
_NO_LOGITS = "its activations give no finite logits"
_LOWER = "training has diverged; lower server-learning-rate or client-learning-rate"
_DIVERGED = f"the server's logits are not finite, {_LOWER}"


class ServerTrainer:
    """The server submodel and its optimizer. trained: its trained parameters, by name.

    answers: the tokens of the answer words. optimizer: "sgd" or "adamw".
    trainable: "full", "blocks" or "lora", see split.trainable_parameters. own_head: whether the
    losses are of this server's head; else that is never trained. gradient_clip: most that the
    norm of a step's gradient may be, 0 is no bound. Raises ConfigError when there is nothing to
    train.
    """

    def __init__(
        self,
        submodel: ServerSubmodel,
        answers: Scoring,
        optimizer: str,
        learning_rate: float,
        trainable: str = "full",
        own_head: bool = True,
        gradient_clip: float = 0.0,
    ):
        self.submodel = submodel
        self.answers = answers
        self.learning_rate = learning_rate
        self.gradient_clip = gradient_clip
        head = submodel.lm_head.weight
        self.device = head.device
        rows = head.detach()[answers.ids]  # a copy, unless it is all of them
        trains_rows = trainable == "full" and own_head
        self.answer_rows = nn.Parameter(rows, requires_grad=trains_rows)
        trained = trainable_parameters(submodel, trainable)
        trained.pop(submodel.family.head, None)
        submodel.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if trains_rows:
            trained[ANSWERS] = self.answer_rows
        self.trained = trained
        own = list(trained.values())
        if not own:
            raise ConfigError(
                f"server-trainable = {trainable} leaves the server nothing to train at this cut: "
                "it has no blocks; lower cut-layer or use full"
            )
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(own, lr=learning_rate)
        else:
            self.optimizer = torch.optim.AdamW(own, lr=learning_rate, weight_decay=0.0)

    def _logits(self, activations: Tensor, mask: Tensor, width: int = 1) -> Tensor:
        """activations [R, S, H], mask [R, S] -> scores float32 [B, C], or [B, V, width] where
        answers are generated.

        Raises DivergedError when they are not finite.
        """
        return _finite(self._sent_labels().outputs(self._states(activations, mask, width)))

    def _states(self, activations: Tensor, mask: Tensor, width: int = 1) -> Tensor:
        """The hidden states that the losses are made of [B, M, D], see tasks/answer_words.py.
        width: positions that have a label."""
        h = activations.to(self.device, torch.float32)
        mask = mask.to(self.device, torch.int64)
        return self.answers.states(self.submodel.hidden(h, mask), width)

    def _sent_labels(self) -> SentLabels:
        head = self.submodel.lm_head
        return SentLabels(self.answers, head.weight, self.answer_rows, head.bias)

    @torch.no_grad()
    def states(self, batch: Activations) -> Tensor:
        """Of a batch, for a client that has its labels: [B, M, D]. Raises DivergedError when they
        are not finite."""
        return _finite(self._states(batch.activations, batch.attention_mask))

    @torch.no_grad()
    def loss(self, batch: Activations) -> float:
        """Mean loss of a batch; the submodel stays as it is (HOSL Alg. 2, L11). Raises
        DivergedError when it is no loss any more."""
        logits = self._logits(batch.activations, batch.attention_mask, _width(batch.labels))
        loss = float(F.cross_entropy(logits, batch.labels.to(self.device)))
        if not loss <= LARGEST_LOSS:
            raise DivergedError(f"a loss is {loss:g}, beyond {LARGEST_LOSS:g}: {_LOWER}")
        return loss

    def train_step(
        self, batch: Activations, factor: float = 1.0, labels: LossSource | None = None
    ) -> float:
        """One first-order step on a batch (HOSL Alg. 1, L27-30); the loss before it."""
        ((_, loss, _),) = self.propagate([batch], [1.0], cut_gradients=False, labels=labels)
        self.apply(factor)
        return loss

    def propagate(
        self,
        batches: Sequence[Activations],
        weights: Sequence[float],
        micro_batch: int = 0,
        cut_gradients: bool = True,
        labels: LossSource | None = None,
    ) -> Iterator[tuple[int, float, Tensor]]:
        """Back-propagate sum_m weights[m] * loss_m over clients' mini-batches; `apply` is the step.

        Yields (m, loss_m, lambda_m) in order, each as soon as client m's sequences are through:
        lambda_m = d loss_m / d activations_m, float32 [R, S, H] on the CPU, the client's own,
        without its weight (empty without cut_gradients). At most `micro_batch` sequences (0: all)
        are propagated at a time, but never less than an example. labels: where losses come from;
        None: the labels in the batches. Raises UnusableBatchError at the end, with nothing to
        apply, when batches give logits or gradients that are not finite, a loss beyond LARGEST_LOSS
        or gradients beyond LARGEST_GRADIENT; those, and all that come after one, are not yielded.
        """
        labels = labels or self._sent_labels()
        self.optimizer.zero_grad(set_to_none=True)
        losses = [0.0] * len(batches)
        gradients: dict[int, Tensor] = {}
        bad: dict[int, str] = {}  # why
        each = self.answers.sequences
        limit = max(1, micro_batch // each) if micro_batch else 0  # whole examples
        sizes = [len(batch.activations) // each for batch in batches]
        for pieces in _micro_batches(sizes, limit):
            h, mask = _stack(batches, pieces, each)
            h = h.to(self.device, torch.float32).requires_grad_(cut_gradients)
            with torch.set_grad_enabled(not bad):  # once one is bad, the rest is only looked at
                outputs = self._outputs(h, mask, batches, pieces, labels)
            bad |= _unusable(outputs, pieces)
            if bad:
                continue
            own = labels.backward(outputs, batches, pieces, weights)
            for piece, loss in zip(pieces, own, strict=True):
                losses[piece.client] += loss
                shape = batches[piece.client].activations.shape if cut_gradients else (0,)
                gradients.setdefault(piece.client, torch.zeros(shape))
            if cut_gradients:
                assert h.grad is not None
                _unstack(h.grad.cpu(), pieces, weights, gradients, each)
            for m in (piece.client for piece in pieces if piece.stop == sizes[piece.client]):
                gradient = gradients.pop(m)
                if reason := _absurd(losses[m], largest(gradient)):
                    bad[m] = reason
                else:
                    yield m, losses[m], gradient
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            message = (
                _DIVERGED if _NO_LOGITS in bad.values() else f"{min(bad.items())[1]}; {_LOWER}"
            )
            raise UnusableBatchError(message, dict(sorted(bad.items())))
        self._check_gradient(batches, sizes, limit, labels)

    def _outputs(
        self,
        h: Tensor,
        mask: Tensor,
        batches: Sequence[Activations],
        pieces: Sequence[BatchPiece],
        labels: LossSource,
    ) -> Tensor:
        """Of the pieces' activations h [n, S, H]: what their losses are a function of."""
        width = max(_width(batches[piece.client].labels) for piece in pieces)
        return labels.outputs(self._states(h, mask, width))

    def _check_gradient(
        self,
        batches: Sequence[Activations],
        sizes: Sequence[int],
        limit: int,
        labels: LossSource,
    ) -> None:
        """UnusableBatchError, with nothing to apply, unless the step's gradient can be used. Whose
        batch it is that spoils it is found by propagating each alone."""
        if self._largest_gradient() <= LARGEST_GRADIENT:
            return
        each, bad = self.answers.sequences, {}
        for m in range(len(batches)):
            self.optimizer.zero_grad(set_to_none=True)
            for pieces in _micro_batches([n * (i == m) for i, n in enumerate(sizes)], limit):
                h, mask = _stack(batches, pieces, each)
                outputs = self._outputs(
                    h.to(self.device, torch.float32), mask, batches, pieces, labels
                )
                labels.backward(outputs, batches, pieces, [1.0] * len(batches))
            if reason := _absurd(0.0, self._largest_gradient()):
                bad[m] = reason
        self.optimizer.zero_grad(set_to_none=True)
        reason = min(bad.items())[1] if bad else "the clients' gradients cannot be used together"
        raise UnusableBatchError(f"{reason}; {_LOWER}", bad)

    def _largest_gradient(self) -> float:
        """Of any trained value; not a number if one gradient is none."""
        own = [p.grad for p in self.trained.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(own, math.inf))

    def apply(self, factor: float = 1.0) -> None:
        """The optimizer's step along what has been propagated. factor: of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        if self.gradient_clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.gradient_clip)
        self.optimizer.step()

    @torch.no_grad()
    def score(self, batch: Activations, score: Addable) -> None:
        """Add a held-out batch to a score."""
        score.add(
            self._logits(batch.activations, batch.attention_mask, _width(batch.labels)),
            batch.labels.to(self.device),
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All server tensors by canonical name: adapters merged into the weights they adapt, the
        answer rows put back into the head."""
        tensors: dict[str, Tensor] = self.submodel.merged_parameters()
        name = self.submodel.family.head
        head = tensors[name].clone()
        head[self.answers.ids] = self.answer_rows
        return {**tensors, name: head}

    def trained_count(self) -> int:
        """Number of trained elements."""
        return sum(parameter.numel() for parameter in self.trained.values())

    @torch.no_grad()
    def adopt_head(self, parameters: Mapping[str, Tensor]) -> None:
        """Take over final norm and answer rows from a client's auxiliary head
        (models/auxiliary_head.py)."""
        self.answer_rows.copy_(parameters[f"{AUXILIARY}rows"])
        decoder = f"{AUXILIARY}decoder."
        for name, value in parameters.items():
            if name.startswith(decoder):
                own = name.removeprefix(decoder)
                self.submodel.decoder.get_parameter(own).copy_(value)


def _width(labels: Tensor) -> int:
    """At how many positions, the last, an example has a label."""
    return labels.shape[1] if labels.dim() == 2 else 1


def _finite(outputs: Tensor) -> Tensor:
    if not torch.isfinite(outputs).all():
        raise DivergedError(_DIVERGED)
    return outputs


def _unusable(outputs: Tensor, pieces: Sequence[BatchPiece]) -> dict[int, str]:
    """Clients with logits, or hidden states, that are not finite; and why they are named."""
    finite = torch.isfinite(outputs).flatten(1).all(1).split([p.stop - p.start for p in pieces])
    bad = [p.client for p, own in zip(pieces, finite, strict=True) if not own.all()]
    return dict.fromkeys(bad, _NO_LOGITS)


def _absurd(loss: float, gradient: float) -> str:
    """Why a client's batch cannot be used, given its loss and the largest value of a gradient of
    it; "" when it can."""
    if not loss <= LARGEST_LOSS:
        return f"its batch has a loss of {loss:g}, beyond {LARGEST_LOSS:g}"
    if not gradient <= LARGEST_GRADIENT:
        return f"its batch gives a gradient of up to {gradient:g}, beyond {LARGEST_GRADIENT:g}"
    return ""


def _micro_batches(sizes: Sequence[int], limit: int) -> Iterator[list[BatchPiece]]:
    """The examples of all mini-batches, in order, in groups of at most `limit` (0: one group)."""
    limit = limit or sum(sizes)
    pieces: list[BatchPiece] = []
    room = limit
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append(BatchPiece(index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces


def _stack(
    batches: Sequence[Activations], pieces: Sequence[BatchPiece], each: int
) -> tuple[Tensor, Tensor]:
    """Activations [n, S, H] and mask [n, S] of the pieces, left-padded to the longest S. Masked
    positions change nothing at the others. each: sequences per example."""
    length = max(batches[piece.client].activations.shape[1] for piece in pieces)
    hs, masks = [], []
    for index, start, stop in pieces:
        batch, rows = batches[index], slice(start * each, stop * each)
        pad = length - batch.activations.shape[1]
        hs.append(F.pad(batch.activations[rows], (0, 0, pad, 0)))
        masks.append(F.pad(batch.attention_mask[rows], (pad, 0)))
    return torch.cat(hs), torch.cat(masks)


def _unstack(
    gradient: Tensor,
    pieces: Sequence[BatchPiece],
    weights: Sequence[float],
    out: Mapping[int, Tensor],
    each: int,
) -> None:
    """Write each piece's rows of the gradient [n, S, H], less padding and client weight."""
    row = 0
    for index, start, stop in pieces:
        own, count = out[index], (stop - start) * each
        rows = gradient[row : row + count, -own.shape[1] :]
        own[start * each : stop * each] = rows if weights[index] == 1.0 else rows / weights[index]
        row += count
