"""What a client does with a request. No Flower here: links bring requests in.

A client's state is its base checkpoint and its ledger position, nothing else: lose the process
and a new one is brought to the same bits. One Client object can serve many partitions (a Ray
worker, an edge gateway), since in these methods all clients share one submodel.
"""

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from hosl_flower.codec import encode, has_scales
from hosl_flower.errors import DriftError, HoslError, ProtocolError
from hosl_flower.forward import HERE, Forwards, put_together
from hosl_flower.ledger import Entry, chain, chain_entries
from hosl_flower.local import local_steps
from hosl_flower.memory import Meter, peak_rss_bytes
from hosl_flower.messages import (
    Activations,
    Applied,
    Behind,
    CatchUp,
    Change,
    CutGradient,
    Describe,
    Described,
    Evaluate,
    Failure,
    Fingerprint,
    Fingerprinted,
    Forward,
    LocalTrain,
    Losses,
    Probe,
    Reply,
    Request,
    Restore,
    Scalars,
)
from hosl_flower.partition import DataPool
from hosl_flower.spec import ClientSpec, pick_device, torch_dtype
from hosl_flower.split import ClientSubmodel, load_client, open_base, trainable_parameters
from hosl_flower.state import ClientState
from hosl_flower.surrogate import Cotangent, Pieces
from hosl_flower.tasks import Batch, Encoder, load_tokenizer
from hosl_flower.zo import Point, projected_gradients

log = logging.getLogger("hosl_flower")

_ANCHOR_BYTES = 256 << 20  # clean activations kept for the cut gradient's return, all partitions


class _Anchor(NamedTuple):
    """A mini-batch and its activations at the weights as they are, which the cut gradient will be
    about. All are let go when the weights move."""

    batch: Batch
    activations: Tensor


class Client:
    """The client submodel with its state, and the data of the partitions served.

    data_path, model: this node's own, instead of the run's (node config).
    """

    submodel: ClientSubmodel
    state: ClientState
    forwards: Forwards

    def __init__(self, spec: ClientSpec, data_path: str = "", model: str = "", device: str = ""):
        self.spec = spec
        self.device = pick_device(device or spec.device)
        self.model = model or spec.model
        self.encoder = Encoder(spec.task, load_tokenizer(self.model), spec.max_length)
        self.pool = DataPool(spec, self.encoder, data_path)
        self.meter = Meter(self.device)
        # by partition and number of the mini-batch
        self._anchors: OrderedDict[tuple[int, int], _Anchor] = OrderedDict()
        self.reset()

    def reset(self) -> None:
        """Back to the base checkpoint, before the first update."""
        for name in ("submodel", "state", "forwards"):  # never two copies
            self.__dict__.pop(name, None)
        self._anchors.clear()
        spec = self.spec
        base = open_base(self.model, spec.seed)
        self.vocabulary: int = base.config.vocab_size
        self.hidden: int = base.config.hidden_size
        dtype = torch_dtype(spec.dtype)
        with self.meter.phase("load", 0):
            self.submodel = load_client(
                base, spec.cut_layer, dtype, self.device, spec.lora, spec.client_quantization
            )
        self.state = new_state(self.submodel, spec)
        self.forwards = Forwards(self.submodel, self.state, self.device, spec.client_micro_batch)

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
            kind, values = Failure, {"error": f"{type(error).__name__}: {error}"[:4000]}
        return kind(
            step=request.step,
            seconds=time.perf_counter() - started,
            peak_bytes=peak_rss_bytes(),
            tensor_peaks=tuple(self.meter.peaks.values()),
            **values,
        )

    def _handle(self, request: Request) -> tuple[type[Reply], dict]:
        match request:
            case Describe():
                return self._describe(request)
            case CatchUp():
                return self._catch_up(request)
            case Restore():
                return self._restore(request)
            case Losses() if self._already_applied(request):
                return self._applied()
        here = (self.state.position, self.state.digest)
        if (request.position, request.digest) != here:
            return Behind, {"position": here[0], "digest": here[1]}
        match request:
            case Probe():
                return self._activations("probe", self._train_batch(request), request.point)
            case Forward():
                return self._clean(request)
            case Evaluate():
                data = self.pool.client(request.partition)
                batch = data.held_out_batch(request.batch, self.spec.eval_batch_size)
                return self._activations("forward", batch)
            case Losses():
                return self._update(request)
            case CutGradient():
                return self._local_steps(request)
            case Fingerprint():
                return self._fingerprints(request)
        raise ProtocolError(f"no answer to a {request.kind} request")

    def _describe(self, request: Describe) -> tuple[type[Reply], dict]:
        self.encoder.check_vocabulary(self.vocabulary)
        data = self.pool.client(request.partition)
        return Described, {
            "train_examples": len(data.train),
            "held_out_examples": len(data.held_out),
            "label_counts": tuple(data.label_counts()),
            "memory_meter": self.meter.name,
        }

    def _fingerprints(self, request: Fingerprint) -> tuple[type[Reply], dict]:
        self.state.mark()
        trail = {p: m.fingerprint for p, m in self.state.trail.items() if p >= request.since}
        return Fingerprinted, {"positions": tuple(trail), "fingerprints": tuple(trail.values())}

    def _train_batch(self, request: Forward | CutGradient) -> Batch:
        data = self.pool.client(request.partition)
        return data.train_batch(request.batch, self.spec.batch_size)

    def _phase(self, name: str, batch: Batch, *held: Tensor) -> AbstractContextManager[None]:
        """Measures what a batch needs; held: tensors of the request."""
        anchors = (anchor.activations for anchor in self._anchors.values())
        return self.meter.phase(name, batch.input_ids.numel(), self._held(*anchors, *held))

    def _held(self, *more: Tensor) -> Iterator[Tensor]:
        """The tensors that live as long as the client, and more."""
        yield from itertools.chain(self.submodel.parameters(), self.submodel.buffers())
        yield from itertools.chain(self.state.optimizer.tensors(), more)

    def _activations(
        self, phase: str, batch: Batch, point: Point = HERE
    ) -> tuple[type[Reply], dict]:
        with self._phase(phase, batch):
            return self._reply(batch, self.forwards.pieces(batch, point))

    def _reply(self, batch: Batch, pieces: Pieces) -> tuple[type[Reply], dict]:
        coded = ((first, encode(piece, self.spec.codec)) for first, piece in pieces)
        activations, scales = put_together(coded, len(batch.input_ids))
        return Activations, {
            "activations": activations,
            "scales": scales,
            "attention_mask": batch.attention_mask.bool(),
            "labels": batch.labels,
        }

    def _clean(self, request: Forward) -> tuple[type[Reply], dict]:
        """Activations at theta itself, remembered for the cut gradient that may come back. With
        micro-batches memory matters more than time: then they are computed again."""
        batch = self._train_batch(request)
        if self.spec.client_micro_batch:
            return self._activations("forward", batch)
        with self._phase("forward", batch):
            ((_, activations),) = self.forwards.pieces(batch)
            reply = self._reply(batch, [(0, activations)])
        self._anchors[request.partition, request.batch] = _Anchor(batch, activations)
        while sum(a.activations.nbytes for a in self._anchors.values()) > _ANCHOR_BYTES:
            self._anchors.popitem(last=False)
        return reply

    def _anchor(self, request: CutGradient) -> tuple[Batch, list[Tensor]]:
        """What a cut gradient is about, and its clean activations if they are remembered: by a
        new process they are not."""
        anchor = self._anchors.pop((request.partition, request.batch), None)
        if anchor is None:
            batch, known = self._train_batch(request), []
        else:
            batch, known = anchor.batch, [anchor.activations]
        scales = request.gradient.shape[:2] if has_scales(self.spec.codec) else (0,)
        if request.scales.shape != torch.Size(scales):
            raise ProtocolError(
                f"cut gradient: expected scales {list(scales)}, got {list(request.scales.shape)}"
            )
        expected = [*batch.input_ids.shape, self.hidden]
        if list(request.gradient.shape) != expected:
            raise ProtocolError(
                f"cut gradient: expected {expected}, the shape of this "
                f"client's activations, got {list(request.gradient.shape)}"
            )
        return batch, known

    def _local_steps(self, request: CutGradient) -> tuple[type[Reply], dict]:
        """Probe <lambda, f_c> (HO-SFL); see local.py."""
        batch, known = self._anchor(request)
        with self._phase("probe", batch, request.gradient, *known):
            gradient = Cotangent(
                request.gradient.to(self.device), request.scales.to(self.device), request.scale
            )
            anchor = gradient.inner((0, z) for z in known) if known else None
            known.clear()  # one number is all the probes need of it
            scalars, change = local_steps(
                self.state,
                lambda point: self.forwards.pieces(batch, point),
                gradient,
                anchor,
                request,
            )
        if isinstance(request, LocalTrain):
            return Change, {"change": change}
        return Scalars, {"scalars": torch.tensor(scalars, dtype=torch.float32)}

    def _update(self, request: Losses) -> tuple[type[Reply], dict]:
        """Phase 3 of HOSL: regenerate each direction from its seed, step along it."""
        scalars = projected_gradients(request.losses, request.epsilon)
        entry = Entry(request.step, request.seeds, tuple(scalars), request.learning_rate)
        digest = chain(self.state.digest, entry.pack())
        if digest != request.digest_after:
            raise DriftError(
                f"step {request.step}: this client's update gives ledger {digest}, "
                f"the server's {request.digest_after}"
            )
        self._apply([entry])
        return self._applied()

    def _already_applied(self, request: Losses) -> bool:
        """Whether this update has been made: by another partition of this process."""
        if self.state.position == request.position + 1:
            return self.state.digest == request.digest_after
        return self.state.position > request.position

    def _catch_up(self, request: CatchUp) -> tuple[type[Reply], dict]:
        """Apply what is missing of the entries; what was applied already must be the same."""
        entries, state = request.entries, self.state  # validated before anything is lost
        digests = chain_entries(request.digest, entries)
        done = state.position - request.position
        if not (0 <= done < len(digests) and digests[done] == state.digest):
            if request.position:
                return Behind, {"position": state.position, "digest": state.digest}
            self.reset()  # another history: start over from the base checkpoint
            done = 0
            if self.state.digest != request.digest:
                raise ProtocolError("catch-up: the entries are of another run")
        self._apply(entries[done:])
        return self._applied()

    def _restore(self, request: Restore) -> tuple[type[Reply], dict]:
        if (self.state.position, self.state.digest) != (request.position, request.digest):
            self._anchors.clear()
            try:
                self.state.restore(request.snapshot, request.step)
            except ValueError as error:
                raise ProtocolError(f"restore: {error}") from error
        return self._applied()

    def _apply(self, entries: list[Entry]) -> None:
        if entries:
            self._anchors.clear()
            directions = max(len(entry.seeds) for entry in entries)
            with self.meter.phase("update", directions, self._held()):
                self.state.apply(entries)

    def _applied(self) -> tuple[type[Reply], dict]:
        return Applied, {"position": self.state.position, "digest": self.state.digest}


def new_state(submodel: ClientSubmodel, spec: ClientSpec) -> ClientState:
    """The state of a freshly loaded client submodel: ledger position 0."""
    parameters = trainable_parameters(submodel, spec.client_trainable)
    return ClientState(parameters, spec.perturbation, spec.client_optimizer, spec.genesis)
