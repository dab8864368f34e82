"""What a run will need, before it is started: memory, bytes and time of a step.

Time and bytes are those of a few real steps in this process, with real batches. Memory is that of
the largest batch there can be, batch-size examples of max-length tokens, found on shapes alone
(tensors/shapes_only.py) with the client's own code. Nothing is written.
"""

import copy
import logging
import math
import time
from dataclasses import asdict, dataclass

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from hosl_flower.client.client import Client
from hosl_flower.client.mini_batches import OneMiniBatch
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.methods.load import load_method
from hosl_flower.methods.method import Method
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.protocol.messages.kept_labels import HeldOutStates
from hosl_flower.run.loop import describe_all, judge_of
from hosl_flower.run.start import open_run
from hosl_flower.server.evaluate import score_batches
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.kept_labels import STATES_BYTES
from hosl_flower.server.link import Link
from hosl_flower.server.session import Session
from hosl_flower.tensors.device import torch_dtype
from hosl_flower.tensors.memory import PHASES
from hosl_flower.tensors.shapes_only import shapes_only

log = logging.getLogger("hosl_flower")

# What a client's process has besides its tensors, on a CPU: interpreter, libraries and data. A
# ClientApp with the bundled data has 0.6 GB (tests/benchmarks/memory.py --process). One that a Ray
# worker is has Ray too, and keeps freed memory longer: 0.63 to 0.81 GB by `client peak memory` of
# runs of simulations/quickstart and simulations/opt125m_hosl.
PROCESS_BYTES = 600_000_000
WORKER_BYTES = 850_000_000

MARGIN = 1.25  # a device with less than so many times what is needed is a tight fit

_SECONDS = 5.0  # of real steps, at least two


@dataclass(frozen=True)
class Plan:
    """Of one run. Bytes, seconds and counts are of one training step and all its clients together,
    unless they say otherwise."""

    method: str
    model: str
    pretrained: bool
    steps: int
    clients: float  # that work in a step
    client_parameters: int
    client_trained: int
    server_trained: int
    client_weight_bytes: int
    peak_bytes: dict[str, int]  # of one client's tensors, by phase, for the largest batch
    up_bytes: float
    down_bytes: float
    client_seconds: float
    server_seconds: float
    evaluation_bytes: float  # one evaluation
    evaluation_seconds: float
    evaluations: int

    @property
    def client_bytes(self) -> int:
        """What a client's process needs on a CPU: of a SuperNode's ClientApp."""
        return max(self.peak_bytes.values()) + PROCESS_BYTES

    @property
    def worker_bytes(self) -> int:
        """The same of a simulated client, which is a Ray worker."""
        return max(self.peak_bytes.values()) + WORKER_BYTES

    def fit(self, memory: float) -> str:
        """Whether a SuperNode with so many bytes can be a client, in a word or so."""
        if self.client_bytes > memory:
            return "DOES NOT FIT"
        if MARGIN * self.client_bytes > memory:
            return f"tight, less than {MARGIN:g} times what is needed"
        return "fits"

    def step_seconds(self, uplink: float, downlink: float) -> float:
        """Of one step: computing and sending one after the other, clients at the same time.

        uplink, downlink: bytes per second of each client; infinite where sending takes no time.
        """
        sending = self.up_bytes / self.clients / uplink + self.down_bytes / self.clients / downlink
        return self.client_seconds / self.clients + self.server_seconds + sending

    def run_seconds(self, uplink: float, downlink: float) -> float:
        """Of the whole run, evaluations included."""
        sending = self.evaluation_bytes / uplink
        evaluations = self.evaluations * (self.evaluation_seconds + sending)
        return self.steps * self.step_seconds(uplink, downlink) + evaluations

    def as_json(self) -> dict[str, object]:
        """All of it."""
        own = {"client_bytes": self.client_bytes, "worker_bytes": self.worker_bytes}
        return {**asdict(self), **own}


def plan(config: RunConfig) -> Plan:
    """Measure and count. Raises what the run itself would at its start."""
    level = log.level
    log.setLevel(logging.WARNING)  # what a run says at its start is not wanted here
    try:
        return _plan(config)
    finally:
        log.setLevel(level)


def _plan(config: RunConfig) -> Plan:
    config = config.with_keys({"resume": ""})  # from the first step, whatever is there
    method = load_method(config)
    session = open_run(method, "plan")[0]
    client = Client(session.spec, secret=simulated_secret(session.spec.seed))
    link = InProcessLink(client.answer, session.history, session.limits)
    describe_all(session, link)
    method.settle(session)
    evaluation = _one_evaluation(session, judge_of(session, link))
    step = _steps(method, session, link)
    held, trained = session.client_counts()
    return Plan(
        method=method.name,
        model=session.spec.model,
        pretrained=session.base.pretrained,
        steps=config.steps,
        client_parameters=held,
        client_trained=trained,
        server_trained=session.server.trained_count(),
        client_weight_bytes=held * torch_dtype(session.spec.dtype).itemsize,
        peak_bytes=peaks_of(config, session.sample(1)),
        **step,
        **evaluation,
        evaluations=1 + math.ceil(config.steps / config.evaluation.every),
    )


def peaks_of(config: RunConfig, partitions: list[int]) -> dict[str, int]:
    """Peak bytes of a client's tensors by phase, weights included, in the first two steps: what an
    optimizer keeps is there in the second. And in an evaluation, less the caches of answers that
    are generated.

    partitions: the clients of these steps.
    """
    few = {
        "device": "cpu",  # fake tensors have no allocator to ask, there they are counted
        "steps": 2, "eval-every": 2,
        # what happens every so many steps is in these
        "local-steps": min(2, config.pace.local_steps),
        "upload-every": min(2, config.pace.upload_every),
        "activation-noise": 0.0,  # follows from the examples' bytes, and shapes have none
    }  # fmt: skip
    config = config.with_keys(few)
    with shapes_only():
        method = load_method(config)
        session = open_run(method, "plan")[0]
        session.sampled = partitions
        batch = session.encoder.largest(config.batch_size)
        client = Client(
            session.spec,
            secret=simulated_secret(session.spec.seed),
            mini_batches=lambda pool, spec: OneMiniBatch(pool, spec, batch),
        )
        link = InProcessLink(client.answer, session.history, session.limits)
        describe_all(session, link)
        method.steps(session, link, [1])
        first, ledger = dict(client.meter.peaks), session.history.ledger
        client.meter.start_over()
        if ledger.start <= client.state.position:  # entries in a message would be all zeros
            client.follower.apply(ledger.since(client.state.position))
            for partition in partitions:
                link.arrived(partition)
        method.steps(session, link, [2])
        if config.evaluation.mode == "split":
            _evaluate(session, client)
        second = client.meter.peaks
        return {phase: most for phase in PHASES if (most := max(first[phase], second[phase]))}


def _evaluate(session: Session, client: Client) -> None:
    """The largest part of an evaluation there can be, on shapes."""
    held_out = session.participation.clients[0].held_out_examples
    size = min(session.config.evaluation.batch_size, held_out)
    client.activations.of("evaluate", session.encoder.largest(size), "")
    head = client.work.head
    if head is not None:  # labels = client: it scores hidden states too
        wanted = head.answers.states_per_example, head.weight.shape[1]
        examples = min(held_out, max(1, STATES_BYTES // (4 * math.prod(wanted))))
        states = torch.zeros(examples, *wanted)
        client.losses.held_out(HeldOutStates(**session.at(2, 0), first=0, states=states))


def _steps(method: Method, session: Session, link: InProcessLink) -> dict[str, float]:
    """Per step; the first warms up."""
    done, steps = 0, iter(range(1, session.config.steps + 2))
    method.steps(session, link, [next(steps)])
    session.participation.took_part.clear()
    before, started = copy.deepcopy(link.traffic), time.perf_counter()
    for step in steps:
        method.steps(session, link, [step])
        done += 1
        if time.perf_counter() - started > _SECONDS and done >= session.config.pace.upload_every:
            break
    link.flush()
    seconds = time.perf_counter() - started
    client = link.traffic.client_seconds - before.client_seconds
    clients = session.participation.took_part.total()
    # weights travel every local-steps: whether one of these steps was such a one is chance
    apart = ("fetch", "restore") if method.needs_stream else ()
    up = _sent(link.traffic.up, apart) - _sent(before.up, apart)
    down = _sent(link.traffic.down, apart) - _sent(before.down, apart)
    if method.needs_stream:
        weights = session.history.snapshot_bytes * clients // session.config.pace.local_steps
        up, down = up + weights, down + weights * (session.config.clients.count > 1)
    return {
        "clients": clients / done,
        "up_bytes": up / done,
        "down_bytes": down / done,
        "client_seconds": client / done,
        "server_seconds": max(0.0, seconds - client) / done,
    }


def _sent(way: dict[str, list[int]], apart: tuple[str, ...]) -> int:
    """Bytes of all kinds of requests but these."""
    return sum(size for kind, (_, size) in way.items() if kind not in apart)


def _one_evaluation(session: Session, link: Link) -> dict[str, float]:
    """From one batch of the first client's held-out part."""
    size, each = session.participation.clients[0].held_out_examples, session.spec.eval_batch_size
    batches = math.ceil(size / each)
    before, started = link.traffic.total(link.traffic.up), time.perf_counter()
    middle = batches // 2
    score_batches(session, link, 0, 0, range(middle, middle + 1))
    sent = link.traffic.total(link.traffic.up) - before
    return {
        "evaluation_bytes": batches * sent * (session.config.evaluation.mode == "split"),
        "evaluation_seconds": batches * (time.perf_counter() - started),
    }


def parse_bytes(name: str, text: str) -> float:
    """Bytes of "2GB" or "512MiB"; infinite for nothing. ConfigError for anything else."""
    if not text:
        return math.inf
    try:
        if text.strip()[-1:].isdigit():
            raise ConfigError(f"{name} = {text!r}: say of what, as in {text.strip()}GB")
        return float(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ConfigError(f"{name} = {text!r}: expected a size such as 512MB or 2GiB") from error


def parse_rate(name: str, text: str) -> float:
    """Bytes per second of "10Mbps"; infinite for nothing. ConfigError for anything else."""
    if text and not text.lower().endswith("bps"):
        raise ConfigError(f"{name} = {text!r}: expected a rate such as 10Mbps")
    try:
        rate = parse_bytes(name, text[:-3] + "bit" if text else "")
    except ConfigError as error:
        raise ConfigError(f"{name} = {text!r}: expected a rate such as 10Mbps") from error
    if rate <= 0:
        raise ConfigError(f"{name} = {text!r}: expected more than nothing")
    return rate
