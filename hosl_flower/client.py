"""What a client does with a request. No Flower here: links bring requests in.

A client's state is its base checkpoint and its ledger, nothing else: lose the process and a
new one is brought to the same bits by replay. One Client object can serve many partitions
(a Ray worker, an edge gateway), since in these methods all clients share one submodel.
"""

import logging
import time
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hosl_flower import ledger as ledgers
from hosl_flower.data import ClientData, load_client_data
from hosl_flower.errors import DriftError, HoslError, ProtocolError
from hosl_flower.ledger import Entry, Ledger
from hosl_flower.memory import meter_name, peak_bytes
from hosl_flower.messages import (
    Activations,
    Applied,
    Behind,
    CatchUp,
    Describe,
    Described,
    Evaluate,
    Failure,
    Fingerprint,
    Fingerprinted,
    Forward,
    Losses,
    Probe,
    Reply,
    Request,
)
from hosl_flower.perturb import Layout
from hosl_flower.probe import perturbed
from hosl_flower.spec import ClientSpec, pick_device, torch_dtype
from hosl_flower.split import ClientSubmodel, load_client, open_base, trainable_parameters
from hosl_flower.tasks import Batch, Encoder, load_tokenizer
from hosl_flower.zo import projected_gradients

log = logging.getLogger("hosl_flower")


class Client:
    """The client submodel with its ledger, and the data of the partitions served.

    data_path, model: this node's own, instead of the run's (node config).
    """

    submodel: ClientSubmodel
    parameters: dict[str, nn.Parameter]

    def __init__(self, spec: ClientSpec, data_path: str = "", model: str = "", device: str = ""):
        self.spec = spec
        self.device = pick_device(device or spec.device)
        self.data_path = data_path
        self.model = model or spec.model
        self.encoder = Encoder(spec.task, load_tokenizer(self.model), spec.max_length)
        self._partitions: dict[int, ClientData] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the base checkpoint and an empty ledger."""
        for name in ("submodel", "parameters"):  # never two copies
            self.__dict__.pop(name, None)
        self._fingerprint = ("", "")
        base = open_base(self.model, self.spec.seed)
        self.vocabulary: int = base.config.vocab_size
        dtype = torch_dtype(self.spec.dtype)
        self.submodel = load_client(base, self.spec.cut_layer, dtype, self.device)
        self.parameters = trainable_parameters(self.submodel, self.spec.client_trainable)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.layout = Layout(shapes, self.spec.perturbation)
        self.ledger = Ledger(self.spec.genesis)

    def answer(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies, one per request, computed when asked for; ends early after Behind or Failure.

        Never raises: an error becomes a Failure that carries its one line.
        """
        for request in requests:
            started = time.perf_counter()
            try:
                fields = self._handle(request)
            except HoslError as error:
                fields = (Failure, {"error": f"{type(error).__name__}: {error}"[:4000]})
            except Exception as error:
                log.exception("client failed on %s of step %d", request.kind, request.step)
                fields = (Failure, {"error": f"{type(error).__name__}: {error}"[:4000]})
            kind, values = fields
            yield kind(
                step=request.step,
                seconds=time.perf_counter() - started,
                peak_bytes=peak_bytes(self.device),
                **values,
            )
            if kind in (Behind, Failure):
                return

    def _handle(self, request: Request) -> tuple[type[Reply], dict]:
        match request:
            case Describe():
                return self._describe(request)
            case CatchUp():
                return self._catch_up(request)
            case Losses() if self._already_applied(request):
                return self._applied()
        here = (len(self.ledger), self.ledger.digest())
        if (request.position, request.digest) != here:
            return Behind, {"position": here[0], "digest": here[1]}
        match request:
            case Probe():
                batch = self._train_batch(request)
                return self._forward(batch, request.seed, request.coefficient)
            case Forward():
                return self._forward(self._train_batch(request))
            case Evaluate():
                data = self._data(request.partition)
                return self._forward(data.held_out_batch(request.batch, self.spec.eval_batch_size))
            case Losses():
                return self._update(request)
            case Fingerprint():
                return Fingerprinted, {"fingerprint": self.fingerprint()}
        raise ProtocolError(f"no answer to a {request.kind} request")

    def fingerprint(self) -> str:
        """Of the trainable parameters; hashed once per ledger position."""
        at, value = self._fingerprint
        if at != self.ledger.digest():
            value = ledgers.fingerprint(self.parameters)
            self._fingerprint = (self.ledger.digest(), value)
        return value

    def _data(self, number: int) -> ClientData:
        spec = self.spec
        if number not in self._partitions:
            if number >= spec.num_clients:
                raise ProtocolError(f"partition {number} is not one of {spec.num_clients}")
            self._partitions[number] = load_client_data(
                spec.source,
                self.data_path,
                spec.task,
                self.encoder,
                number,
                spec.num_clients,
                spec.train_examples,
                spec.eval_examples,
                spec.seed,
            )
        return self._partitions[number]

    def _describe(self, request: Describe) -> tuple[type[Reply], dict]:
        self.encoder.check_vocabulary(self.vocabulary)
        data = self._data(request.partition)
        return Described, {
            "train_examples": len(data.train),
            "held_out_examples": len(data.held_out),
            "label_counts": tuple(data.label_counts()),
            "memory_meter": meter_name(self.device),
        }

    def _train_batch(self, request: Forward) -> Batch:
        return self._data(request.partition).train_batch(request.batch, self.spec.batch_size)

    @torch.no_grad()
    def _forward(
        self, batch: Batch, seed: int = 0, coefficient: float = 0.0
    ) -> tuple[type[Reply], dict]:
        """Activations at theta + coefficient * s(seed); no graph, weights not written."""
        ids = batch.input_ids.to(self.device)
        mask = batch.attention_mask.to(self.device)
        if coefficient:
            direction = self.layout.draw(seed, self.device)
            with perturbed(self.parameters, direction, coefficient):
                activations = self.submodel(ids, mask)
        else:
            activations = self.submodel(ids, mask)
        return Activations, {
            "activations": activations.cpu(),
            "attention_mask": batch.attention_mask.bool(),
            "labels": batch.labels,
        }

    def _update(self, request: Losses) -> tuple[type[Reply], dict]:
        """Phase 3 of HOSL: regenerate each direction from its seed, step along it."""
        scalars = projected_gradients(request.losses, request.epsilon)
        entry = Entry(request.step, request.seeds, tuple(scalars), request.learning_rate)
        self._apply([entry])
        if self.ledger.digest() != request.digest_after:
            raise DriftError(
                f"step {request.step}: this client's update gives ledger {self.ledger.digest()}, "
                f"the server's {request.digest_after}"
            )
        return self._applied()

    def _already_applied(self, request: Losses) -> bool:
        """Whether this update is in the ledger: another partition of this process made it."""
        return (
            len(self.ledger) > request.position
            and self.ledger.digest(request.position + 1) == request.digest_after
        )

    def _catch_up(self, request: CatchUp) -> tuple[type[Reply], dict]:
        """Apply what is missing of the entries; what is held already must be the same."""
        entries, start = request.entries, request.position  # validated before anything is lost
        held = self.ledger.entries[start:]
        if start == 0 and held != entries[: len(held)]:
            self.reset()  # another history: start over from the base checkpoint
            held = []
        known = start <= len(self.ledger) and self.ledger.digest(start) == request.digest
        if not known or held != entries[: len(held)]:
            return Behind, {"position": len(self.ledger), "digest": self.ledger.digest()}
        self._apply(entries[len(held) :])
        return self._applied()

    def _apply(self, entries: list[Entry]) -> None:
        for entry in entries:
            ledgers.replay(self.parameters, self.layout, [entry])
            self.ledger.append(entry)

    def _applied(self) -> tuple[type[Reply], dict]:
        return Applied, {"position": len(self.ledger), "digest": self.ledger.digest()}
