"""What a client does with a request. No Flower here: links bring requests in.

A client's state is its base checkpoint and its ledger position, nothing else: lose the process
and a new one is brought to the same bits. One Client object can serve many partitions (a Ray
worker, an edge gateway), since in these methods all clients share one submodel.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch

from hosl_flower.client.activations import CutActivations
from hosl_flower.client.generation import Writing
from hosl_flower.client.gradients import ClientGradients
from hosl_flower.client.ledger_follower import UNKNOWN, LedgerFollower, ReplyParts
from hosl_flower.client.losses import LabelLosses
from hosl_flower.client.mini_batches import MiniBatches
from hosl_flower.client.scalars import ProbeScalars
from hosl_flower.client.work import Work
from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.data.client_data import DataPool
from hosl_flower.data.encoders.make import make_inputs
from hosl_flower.errors import IN_THE_LOG, DataError, HoslError, ProtocolError, public_reason
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.new_state import load_client_half, new_state
from hosl_flower.models.base_model import model_config, open_base
from hosl_flower.models.label_head import OutputHead, load_output_head
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.privacy.activation_noise import activation_noise_of
from hosl_flower.privacy.dp_scalars import mechanism_of
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.protocol.messages.activations import Activations, Evaluate, Forward, Probe
from hosl_flower.protocol.messages.base import Behind, Failure, Reply, Request
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.generation import Continue, Continued, Grade, Graded
from hosl_flower.protocol.messages.gradients import (
    Adopt,
    Backward,
    Change,
    Fetch,
    Gradient,
    LocalStep,
    Stepped,
    Weights,
)
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    Scored,
)
from hosl_flower.protocol.messages.ledger import (
    ApplyDeltas,
    CatchUp,
    Fingerprint,
    Fingerprinted,
    Losses,
    Restore,
)
from hosl_flower.protocol.messages.scalars import CutGradient, HeadProbe, LocalTrain, Scalars
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tensors.device import pick_device
from hosl_flower.tensors.memory import Meter, peak_rss_bytes

log = logging.getLogger("hosl_flower")


class Client:
    """The client submodel with its state, and the data of the partitions served.

    data_path, model: this node's own, instead of the run's (node config). secret: of this device's
    noise (privacy/noise_secret.py), for runs that have any: ValueError without. columns: of the
    data that a run may use, all where none are given. remote: whether the server is not of this
    machine, as in a simulation it is: then an error leaves with its public text alone.
    """

    work: Work

    def __init__(
        self,
        spec: ClientSpec,
        data_path: str = "",
        model: str = "",
        device: str = "",
        secret: bytes | None = None,
        columns: tuple[str, ...] = (),
        remote: bool = False,
        mini_batches: Callable[[DataPool, ClientSpec], MiniBatches] = MiniBatches,
    ):
        self.spec, self.remote = spec, remote
        self.secret = secret
        self.mechanism, self.noise = mechanism_of(spec, secret), activation_noise_of(spec, secret)
        self.device = pick_device(device or spec.device)
        self.model = model or spec.model
        self.encoder = make_inputs(spec, self.model, model_config(self.model))
        self.pool = DataPool(spec, self.encoder, data_path, columns)
        self.meter = Meter(self.device)
        self._mini_batches = mini_batches
        self.reset()

    @property
    def submodel(self) -> ClientSubmodel:
        """The client submodel as it is now."""
        return self.work.submodel

    @property
    def state(self) -> ClientState:
        """Trained parameters, optimizer and position in the ledger."""
        return self.work.state

    def reset(self) -> None:
        """Back to the base checkpoint, before the first update."""
        if hasattr(self, "work"):
            self.work.release()  # never two copies of the weights
        self.work = self._load()
        self.follower = LedgerFollower(self.work)
        self.activations = CutActivations(self.work)
        self.losses = LabelLosses(self.work)
        self.scalars = ProbeScalars(self.work, self.activations)
        self.gradients = ClientGradients(self.work, self.activations, self.scalars)
        self.writing = Writing(self.work, self.pool)

    def _start_over(self) -> LedgerFollower:
        self.reset()
        return self.follower

    def _load(self) -> Work:
        spec = self.spec
        base = open_base(self.model, spec.seed, partial=True)
        self.config = base.config
        head: OutputHead | None = None
        with self.meter.phase("load", 0):
            submodel = load_client_half(
                base, spec, self.encoder.answers, self.device, spec.client_quantization
            )
            if spec.labels == "client":
                answers = self.encoder.answers
                assert isinstance(answers, AnswerWords)  # inputs.make_inputs has checked it
                head = load_output_head(submodel, base, answers, self.device, spec.client_trainable)
        return Work(
            spec, submodel, new_state(submodel, spec), self._mini_batches(self.pool, spec),
            self.meter, self.device, head, self.mechanism, self.noise,
        )  # fmt: skip

    def answer(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies, one per request, computed when asked for; ends early after Behind or Failure.

        Never raises: an error becomes a Failure that carries its one line.
        """
        for request in requests:
            reply = self._answer(request)
            last = isinstance(reply, (Behind, Failure))
            yield reply
            del reply  # its activations are not to outlive their sending
            if last:
                return

    def _answer(self, request: Request) -> Reply:
        started = time.perf_counter()
        try:
            kind, values = self._handle(request)
        except Exception as error:
            if not isinstance(error, HoslError):
                log.exception("client failed on %s of step %d", request.kind, request.step)
            kind, values = Failure, {"error": self._reason(error)}
        return kind(
            step=request.step,
            seconds=time.perf_counter() - started,
            peak_bytes=peak_rss_bytes(),
            tensor_peaks=tuple(self.meter.peaks.values()),
            **values,
        )

    def _reason(self, error: Exception) -> str:
        """The text about an error that the server gets: the whole where it is of this machine, the
        public text elsewhere, and nothing of an example where labels or more stay here."""
        kind, private = type(error).__name__, not self.spec.tells_labels
        of_data = isinstance(error, DataError) or not isinstance(error, HoslError)
        if not self.remote and not (private and of_data):
            return f"{kind}: {error}"[:4000]
        log.error("%s: %s", kind, error)
        if private and of_data:
            return f"{kind}: {IN_THE_LOG}, which keeps its data to itself"
        return public_reason(error)[:4000]

    def _handle(self, request: Request) -> ReplyParts:
        if self.mechanism is not None and not request.private:
            raise ProtocolError(
                f"{request.kind}: with dp-noise nothing but noisy scalars leaves this client"
            )
        match request:
            case Describe():
                return self._describe(request)
            case HiddenStates():
                judged = self.losses.train(request)
                return HiddenGradient, {"loss": judged.loss, "gradient": judged.gradient.cpu()}
            case HeldOutStates():
                judged = self.losses.held_out(request)
                loss_sum = judged.loss * len(request.states)
                return Scored, {"correct": judged.correct, "loss_sum": loss_sum}
            case CatchUp():
                return self.follower.catch_up(request, self._start_over)
            case Restore():
                return self.follower.restore(request)
            case ApplyDeltas():
                return self.follower.move(request)
            case Losses() | Adopt() if self.follower.already_applied(request):
                return self.follower.applied()
        here = (self.state.position, self.state.digest)
        if (request.position, request.digest) != here:
            return Behind, {"position": here[0], "digest": here[1]}
        if isinstance(request, LocalStep) and self.work.local_weights.has_taken(request):
            return Stepped, {"local": request.local + 1}  # asked again: its receipt was lost
        at_shared = self.work.local_weights.at_shared
        if not self.work.local_weights.enter(request):
            # nobody's ledger has this digest: whatever is needed will be sent
            return Behind, {"position": 0, "digest": UNKNOWN}
        if not (at_shared and self.work.local_weights.at_shared):
            self.work.moved()
        handler = self._HANDLERS.get(type(request))
        if handler is None:
            raise ProtocolError(f"no answer to a {request.kind} request")
        return handler(self, request)

    def _describe(self, request: Describe) -> ReplyParts:
        self.encoder.check(self.config)
        data = self.pool.client(request.partition)
        if self.mechanism is not None:  # a step is not to fail for what is in one example
            data.check()
        told = self.spec.tells_labels
        return Described, {
            "train_examples": len(data.train),
            "held_out_examples": len(data.held_out),
            "label_counts": tuple(data.label_counts()) if told else (),
            "memory_meter": self.meter.name,
            "simulated_noise": self.secret == simulated_secret(self.spec.seed),
            "held_out_overlap": data.overlap.flat() if told and data.overlap else (),
        }

    def _update(self, request: Losses) -> ReplyParts:
        return self.follower.update(request)

    def _adopt(self, request: Adopt) -> ReplyParts:
        return self.follower.adopt(request)

    def _fingerprints(self, request: Fingerprint) -> ReplyParts:
        self.state.mark()
        trail = {p: m.fingerprint for p, m in self.state.trail.items() if p >= request.since}
        return Fingerprinted, {"positions": tuple(trail), "fingerprints": tuple(trail.values())}

    def _probe(self, request: Probe) -> ReplyParts:
        return Activations, self.activations.probed(request)

    def _forward(self, request: Forward) -> ReplyParts:
        return Activations, self.activations.clean(request)

    def _evaluate(self, request: Evaluate) -> ReplyParts:
        return Activations, self.activations.evaluate(request)

    def _continue(self, request: Continue) -> ReplyParts:
        return Continued, self.writing.continued(request)

    def _grade(self, request: Grade) -> ReplyParts:
        return Graded, {"scores": self.writing.grades(request)}

    def _cut_gradient(self, request: CutGradient) -> ReplyParts:
        scalars, _ = self.scalars.linear(request)
        return Scalars, {"scalars": torch.tensor(scalars, dtype=torch.float32)}

    def _local_train(self, request: LocalTrain) -> ReplyParts:
        return Change, vars(self.gradients.change(request))

    def _head_probe(self, request: HeadProbe) -> ReplyParts:
        scalars, loss = self.scalars.head(request)
        return Scalars, {"scalars": torch.tensor(scalars, dtype=torch.float32), "loss": loss}

    def _backward(self, request: Backward) -> ReplyParts:
        return Gradient, vars(self.gradients.gradient(request))

    def _local_step(self, request: LocalStep) -> ReplyParts:
        self.work.local_weights.keep_shared()
        try:
            self.gradients.local_step(request)
        except BaseException:
            self.work.local_weights.lost()
            raise
        self.work.local_weights.moved(request)
        return Stepped, {"local": request.local + 1}

    def _fetch(self, request: Fetch) -> ReplyParts:
        with self.work.phase("exchange", self.state.elements):
            now = self.state.snapshot(request.moments)
        return Weights, {"updates": now.updates, "weights": now.weights, "moments": now.moments}

    _HANDLERS: ClassVar[dict[type[Request], Callable[..., ReplyParts]]] = {
        Probe: _probe,
        Forward: _forward,
        Evaluate: _evaluate,
        Continue: _continue,
        Grade: _grade,
        Losses: _update,
        CutGradient: _cut_gradient,
        LocalTrain: _local_train,
        HeadProbe: _head_probe,
        Backward: _backward,
        LocalStep: _local_step,
        Fetch: _fetch,
        Adopt: _adopt,
        Fingerprint: _fingerprints,
    }
