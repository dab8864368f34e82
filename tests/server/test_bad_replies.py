"""One client's replies never cost a run, or its checkpoints, what the others have trained."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from runs import metrics, run_factory
from safetensors.torch import load_file, save_file
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.errors import (
    CheckpointError,
    ClientError,
    DivergedError,
    DriftError,
    OutOfRangeError,
    ProtocolError,
    printable,
)
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.gradients import Change, Gradient, Weights
from hosl_flower.protocol.messages.kept_labels import HiddenGradient
from hosl_flower.protocol.messages.ledger import Applied, Fingerprinted
from hosl_flower.protocol.messages.scalars import Scalars
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.run import loop as training
from hosl_flower.run import recorder
from hosl_flower.run.checkpoint import Checkpoint, _sha256, read, write
from hosl_flower.run.recorder import Recorder
from hosl_flower.server import open_session as sessions
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.participation import MOST_DROPS, Participation
from hosl_flower.server.reference import NO_REFERENCE
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tensors.memory import PHASES
from strategies.fedavg_zo import FedAvgZo
from strategies.frozen_client import FrozenClient
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

IDLE = {"directions": 1, "client_learning_rate": 1e-6}  # not used by a client that is frozen
FEW = {"num_clients": 3, "min_clients": 2, "save_model": False, "checkpoint_every": 1}


@pytest.fixture
def make(tiny_opt, tmp_path):
    """Factory of finished runs of two steps."""
    own = {"steps": 2, "eval-every": 2, "client-trainable": "blocks", "directions": 1}
    return run_factory(HoSfl, tiny_opt, tmp_path, **own)


@pytest.fixture
def replies_are(monkeypatch):
    """replies_are(change): links hand on change(partition, request, reply), or reply if None."""

    def rogue(change):
        class Rogue(InProcessLink):
            def _deliver(self, requests, until):
                streams = super()._deliver(requests, until)
                return {p: self._changed(p, requests[p], own) for p, own in streams.items()}

            def _changed(self, partition, sent, stream):
                for request, reply in zip(sent, stream, strict=False):
                    yield change(partition, request, reply) or reply

        monkeypatch.setattr("hosl_flower.run.start.InProcessLink", Rogue)

    return rogue


def of_client_1(kind, field, spoil, steps=(2,)):
    """Replaces a field of client 1's training replies of a kind in some steps."""

    def change(partition, request, reply):
        training = request.kind not in ("evaluate", "fingerprint", "describe")
        if partition == 1 and training and request.step in steps and isinstance(reply, kind):
            return replace(reply, **{field: spoil(getattr(reply, field))})
        return None

    return change


def one(value):
    """The first element is this."""

    def spoil(tensor):
        spoiled = tensor.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    return spoil


def everywhere(value):
    return lambda tensor: torch.full_like(tensor, value)


def only_client_1_is_dropped(results, directory, reason):
    (drop,) = results.clients["dropped"]
    assert (drop["step"], drop["partition"]) == (2, 1)
    assert reason in drop["reason"]
    assert results.clients["times_dropped"] == {"1": 1}
    assert math.isfinite(results.loss)
    for path in directory.glob("checkpoint-*/tensors.safetensors"):
        tensors = load_file(path).values()
        assert all(torch.isfinite(t).all() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(
    ("family", "spoil"),
    [
        ("opt", everywhere(1e18)),
        ("opt", everywhere(-1e6)),
        ("llama", one(3e38)),
        ("qwen3", one(3e38)),
        ("gemma3", one(1e6)),
    ],
)
def test_activations_far_beyond_the_models_own_cost_a_client_its_step(
    make, replies_are, family, spoil
):
    replies_are(of_client_1(Activations, "activations", spoil))
    results, directory, _ = make(FrozenClient, **FEW, **IDLE, model=f"random:{family}-tiny")
    only_client_1_is_dropped(results, directory, "client 1, step 2, forward: activations: expected")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_activations_in_fewer_bytes_are_bounded_too(make, replies_are, codec):
    field = "scales" if codec == "int8" else "activations"
    replies_are(of_client_1(Activations, field, one(1e12)))
    results, directory, _ = make(**FEW, codec=codec)
    only_client_1_is_dropped(results, directory, "activations: expected at most")


@pytest.fixture
def unbounded(monkeypatch):
    """No reply is refused for its size: the server has to see what it leads to."""
    monkeypatch.setattr(sessions, "reference_of", lambda *_: NO_REFERENCE)


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("method", [HoSfl, FrozenClient])
def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer(
    make, replies_are, unbounded, method, micro_batch
):
    keys = {**FEW, "model": "random:llama-tiny", "server_micro_batch": micro_batch}
    keys |= {**IDLE, "server_optimizer": "adamw"}
    replies_are(of_client_1(Activations, "activations", one(3e38)))
    results, directory, _ = make(method, **keys)
    only_client_1_is_dropped(results, directory, "beyond 1e+06")

    def failing(partition, request, reply):
        if (partition, request.kind, request.step) == (1, "forward", 2):
            return Failure(2, 0.0, 0, "gone")
        return None

    replies_are(failing)
    _, expected, _ = make(method, **keys)
    losses = [[row["train_loss"] for row in metrics(d)[1:3]] for d in (directory, expected)]
    assert losses[0] == losses[1], "the step is taken without it"


def test_a_server_that_cannot_tell_whose_gradient_is_absurd_does_not_move(
    make, monkeypatch, caplog
):
    found = iter([0.1, math.nan, 0.1, 0.1, 0.1])  # of the first step, of the second, of each alone
    monkeypatch.setattr(ServerTrainer, "_largest_gradient", lambda self: next(found))
    results, _, _ = make(FrozenClient, **FEW, **IDLE)
    assert "step 2: the server does not move" in caplog.text
    assert results.clients["dropped"] == []


def test_a_client_that_is_alone_ends_the_run_and_the_checkpoint_stays_good(
    make, replies_are, tmp_path
):
    def huge(partition, request, reply):
        if request.kind == "forward" and request.step == 4:
            return replace(reply, activations=torch.full_like(reply.activations, 1e18))
        return None

    replies_are(huge)
    keys = {"steps": 4, "eval_every": 4, "checkpoint_every": 2, "save_model": False}
    with pytest.raises(DivergedError, match=r"activations: expected at most.*lower server-learn"):
        make(Hosl, **keys)
    assert read(tmp_path / "runs" / "run0").step == 2


@pytest.mark.parametrize(
    ("method", "kind", "field", "value", "more"),
    [
        (SplitFo, Gradient, "values", 1e9, {}),
        (SplitFo, Gradient, "values", 1e9, {"client_optimizer": "adamw"}),
        (SplitFo, Gradient, "scales", 1e9, {"update_codec": "int8"}),
        (SplitFo, Weights, "weights", 1e9, {"local_steps": 2}),
        (FedAvgZo, Change, "values", 1e9, {}),
        (HoSfl, Scalars, "scalars", 1e9, {}),
        (HoSfl, Scalars, "scalars", -1e9, {"client_optimizer": "adamw"}),
        (Heron, Scalars, "scalars", 1e9, {}),
    ],
)  # fmt: skip
def test_an_update_that_would_wreck_the_clients_half_costs_a_client_its_step(
    make, replies_are, method, kind, field, value, more
):
    replies_are(of_client_1(kind, field, everywhere(value)))
    results, directory, _ = make(method, **FEW, **more)
    only_client_1_is_dropped(results, directory, "expected")


@pytest.mark.parametrize("more", [{"aggregation": "median"}, {"scalar_clip": 1.0}])
def test_scalars_that_are_bounded_where_they_are_merged_cost_nobody_a_step(make, replies_are, more):
    replies_are(of_client_1(Scalars, "scalars", everywhere(1e12)))
    results, _, _ = make(**{**FEW, "min_clients": 3}, **more)
    assert results.clients["dropped"] == []
    assert results.loss < 10


def test_a_loss_of_a_clients_head_is_bounded(make, replies_are):
    replies_are(of_client_1(Scalars, "loss", lambda _: 1e300))
    results, directory, _ = make(Heron, **FEW)
    only_client_1_is_dropped(results, directory, "loss: expected 0..1000")


def test_gradients_of_hidden_states_are_bounded_by_the_head(make, replies_are):
    replies_are(of_client_1(HiddenGradient, "gradient", everywhere(1e9)))
    results, directory, _ = make(**FEW, labels="client")
    only_client_1_is_dropped(results, directory, "gradient: expected values of at most")


def test_limits_are_far_from_honest_numbers():
    rows = history_for(client_spec()).state.rows
    limits = ReplyLimits(8, 32, 64, "float32", 2, step=100.0, rate=1e-2)
    present = torch.ones(rows.count, dtype=torch.bool)
    for kind, most in ((Gradient, 1e4), (Change, 100.0)):
        values = torch.zeros(rows.elements)
        values[0] = 0.99 * most
        reply = kind(1, 0.0, 0, present=present, values=values, scales=torch.empty(0))
        reply.check(None, limits, SimpleNamespace(rows=rows))
        values[0] = -1.01 * most
        with pytest.raises(OutOfRangeError, match="expected values of at most"):
            reply.check(None, limits, SimpleNamespace(rows=rows))


def test_a_run_whose_loss_has_diverged_does_not_end_well(make, monkeypatch):
    keys = {"checkpoint_every": 1, "checkpoints_kept": 2, "steps": 4, "eval_every": 4}
    monkeypatch.setattr(training, "LARGEST_LOSS", 1e-3)
    with pytest.raises(DivergedError, match=r"step 0: the held-out loss is .* beyond 0\.001"):
        make(**keys)


def test_the_servers_gradient_can_be_clipped(make):
    plain, a, _ = make(FrozenClient, **IDLE)
    loose, b, _ = make(FrozenClient, **IDLE, server_gradient_clip=1e5)
    assert metrics(a) == metrics(b)
    tight, c, _ = make(FrozenClient, **IDLE, server_gradient_clip=1e-9, server_optimizer="sgd")
    losses = [row["held_out"]["loss"] for row in metrics(c) if "held_out" in row]
    assert losses[0] == pytest.approx(losses[-1], abs=1e-6), "it hardly moves"
    assert tight.loss != plain.loss == loose.loss


# checkpoints


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path):
    good = Checkpoint(1, {}, {"server.a": torch.ones(3)})
    write(tmp_path, good)
    bad = Checkpoint(2, {}, {"server.a": torch.tensor([1.0, math.nan])})
    with pytest.raises(
        DivergedError, match=r"step 2 is written: server\.a has values that are not"
    ):
        write(tmp_path, bad)
    assert read(tmp_path).step == 1
    path = tmp_path / "checkpoint-1" / "tensors.safetensors"
    save_file({"server.a": torch.tensor([math.inf])}, path)
    record = json.loads((path.parent / "checkpoint.json").read_text())
    record["sha256"] = _sha256(path)
    (path.parent / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"server\.a has values that are not finite"):
        read(tmp_path)


def test_the_latest_checkpoints_are_kept(make):
    keys = {"steps": 5, "eval_every": 5, "checkpoint_every": 1, "save_model": False}
    for kept in (1, 2, 3):
        _, directory, _ = make(FrozenClient, **keys, **IDLE, checkpoints_kept=kept)
        found = {path.name for path in directory.glob("checkpoint-*")}
        assert found == {f"checkpoint-{step}" for step in range(5 - kept, 5)}


def test_a_run_that_diverges_leaves_the_checkpoints_before(make, tmp_path, caplog):
    caplog.set_level("INFO", logger="hosl_flower")

    class Wrecked(FrozenClient):
        """Its server's weights are wrecked in step 3, by whatever there may be."""

        def steps(self, session, link, steps):
            losses = super().steps(session, link, steps)
            if 3 in steps:
                with torch.no_grad():
                    next(iter(session.server.trained.values())).fill_(math.nan)
            return losses

    keys = {"steps": 6, "eval_every": 6, "checkpoint_every": 1, **IDLE}
    with pytest.raises(DivergedError, match="no checkpoint of step 3 is written"):
        make(Wrecked, **keys)
    run = tmp_path / "runs" / "run0"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    last = (run / "log.txt").read_text()
    assert "the checkpoint of step 2, without checkpoint-2 from that of step 1" in last


@pytest.fixture
def wrecked_at_the_end(monkeypatch):
    """The server's weights are wrecked after the results, by whatever there may be."""
    real = Recorder.results

    def results(self, method, session, *rest):
        found = real(self, method, session, *rest)
        with torch.no_grad():
            next(iter(session.server.trained.values())).fill_(math.nan)
        return found

    monkeypatch.setattr(Recorder, "results", results)


@pytest.mark.parametrize("save_format", ["merged", "adapters"])
def test_a_model_that_is_not_finite_is_not_saved(make, tmp_path, wrecked_at_the_end, save_format):
    lora = {"client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2}
    own = {**lora, "save_format": "adapters"} if save_format == "adapters" else {}
    told = r"model, .* MB \(\S+ has values that are not finite, .*lower server-learning-rate"
    with pytest.raises(DivergedError, match=rf"{told}.*; results\.json is there$") as raised:
        make(HoSfl, checkpoint_every=1, **own)
    assert "make room" not in str(raised.value)
    run = tmp_path / "runs" / "run0"
    assert math.isfinite(json.loads((run / "results.json").read_text())["loss"])
    assert [p.name for p in run.iterdir() if "model" in p.name] == []
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_last_checkpoint_that_is_not_finite_hides_no_other_failure(
    make, monkeypatch, wrecked_at_the_end, caplog
):
    real = recorder.put

    def full(path, content):
        if path.name == "results.json":
            raise OSError("No space left")
        real(path, content)

    monkeypatch.setattr(recorder, "put", full)
    told = r"results\.json \(No space left\); checkpoint \(no checkpoint of step 2 is written: .*"
    with pytest.raises(DivergedError, match=rf"{told}; the log has the results$"):
        make(HoSfl, checkpoint_every=1, save_model=False)
    assert "results.json could not be written, it would be: {" in caplog.text


# one client of several, at fault


MANY = {"num_clients": 4, "min_clients": 2, "save_model": False}


def test_a_false_fingerprint_costs_one_client_its_place(make, replies_are, caplog):
    def false(partition, request, reply):
        if partition == 1 and isinstance(reply, Fingerprinted) and request.step:
            return replace(reply, fingerprints=("0" * 16,) * len(reply.fingerprints))
        return None

    replies_are(false)
    results, _, _ = make(**MANY, steps=4)
    assert results.clients["expelled"] == [1]
    assert results.clients["fingerprint_checked"] == [0, 2, 3]
    assert results.clients["steps_taken_part"] == {"0": 4, "1": 2, "2": 4, "3": 4}
    (drop,) = results.clients["dropped"]
    assert "client 1: the client submodel drifted" in drop["reason"]
    assert "the run goes on without client 1" in caplog.text
    with pytest.raises(DriftError, match="client 1: the client submodel drifted"):
        make(**{**MANY, "min_clients": 4})


def test_a_false_receipt_costs_one_client_its_step(make, replies_are):
    def false(partition, request, reply):
        if partition == 1 and isinstance(reply, Applied):
            return replace(reply, digest="0" * 16)
        return None

    replies_are(false)
    results, _, _ = make(**MANY)
    reasons = [drop["reason"] for drop in results.clients["dropped"]]
    assert reasons
    assert all("client 1" in reason and "not the server's" in reason for reason in reasons)
    assert set(results.clients["steps_taken_part"]) >= {"0", "2", "3"}
    with pytest.raises(DriftError, match="not the server's"):
        make(**{**MANY, "min_clients": 4})


@pytest.mark.parametrize("how", ["failure", "counts"])
def test_a_client_that_cannot_describe_itself_is_done_without(make, replies_are, caplog, how):
    def failing(partition, request, reply):
        if partition != 1 or not isinstance(request, Describe):
            return None
        if how == "failure":
            return Failure(request.step, 0.0, 0, "DataError: disk gone")
        return replace(reply, label_counts=(1, 10**12))

    replies_are(failing)
    results, _, _ = make(**MANY)
    assert "a client cannot take part yet: client 1" in caplog.text
    assert set(results.clients["steps_taken_part"]) == {"0", "2", "3"}
    with pytest.raises((ClientError, ProtocolError), match="client 1: "):
        make(**{**MANY, "min_clients": 4})


def test_a_false_receipt_is_no_reason_not_to_evaluate(make, replies_are):
    def false(partition, request, reply):
        if request.kind == "evaluate" and partition == 0:
            return Applied(request.step, 0.0, 0, position=0, digest="0" * 16)
        return None

    expected, _, _ = make(**MANY)
    replies_are(false)
    results, _, _ = make(**MANY)
    assert results.loss == expected.loss


# what clients say


EVIL = "x\n2026-01-01 00:00:00,000 step 9/9: all is well\x1b[2J\u202e\u2028\x00" + "y" * 3000


def test_a_failure_is_one_short_line_wherever_it_is_told(make, replies_are):
    def failing(partition, request, reply):
        if partition == 1 and request.kind == "forward" and request.step == 2:
            return Failure(request.step, 0.0, 0, EVIL)
        return None

    replies_are(failing)
    results, directory, _ = make(**FEW)
    (drop,) = results.clients["dropped"]
    assert drop["reason"].isprintable()
    assert r"x\n2026-01-01" in drop["reason"]
    assert len(drop["reason"]) < 600
    for name in ("log.txt", "metrics.jsonl", "results.json"):
        text = (directory / name).read_text()
        assert "y" * 600 not in text
        assert "\x1b" not in text
        assert not any(line.startswith("2026-01-01 00:00:00,000") for line in text.splitlines())


def test_printable_text():
    assert printable("a film, 5 \u00e9toiles") == "a film, 5 \u00e9toiles"
    assert printable("a\r\n\t\x7f\u2066\ud800") == r"a\r\n\t\x7f\u2066\ud800"
    assert printable("abcdef", 3) == "abc..."
    assert printable("abc", 3) == "abc"
    assert str(ProtocolError("a\nb")) == r"a\nb"


def test_only_so_many_failures_of_a_client_are_kept():
    participation = Participation()
    for step in range(3 * MOST_DROPS):
        participation.drop(step, 1, "gone")
    participation.drop(5, 2, "gone")
    assert len(participation.dropped) == MOST_DROPS + 1
    assert participation.times_dropped == {1: 3 * MOST_DROPS, 2: 1}
    reported = participation.dropped_at
    assert reported[3 * MOST_DROPS - 1] == {1: "gone"}, "each step's line names who was left out"
    assert reported[5] == {1: "gone", 2: "gone"}


@pytest.fixture(scope="module")
def client():
    return Client(client_spec())


LIMITS = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)


class Claims(InProcessLink):
    """Its client claims something of itself."""

    claim: ClassVar = {}

    def _deliver(self, requests, until):
        streams = super()._deliver(requests, until)
        return {p: (replace(r, **self.claim) for r in own) for p, own in streams.items()}


def described(client, **claim):
    history = history_for(client.spec)
    client.reset()
    link = Claims(client.answer, history, LIMITS)
    link.claim = claim
    at = {"step": 1, "partition": 0, "position": 0, "digest": history.ledger.digest()}
    (reply,) = link.exchange({0: [Describe(**at)]})[0]
    assert isinstance(reply, Described)
    return link


@pytest.mark.parametrize(
    "claim", [{"peak_bytes": 2**62}, {"tensor_peaks": (2**62,) + (0,) * (len(PHASES) - 1)}]
)
def test_memory_that_no_machine_has_is_refused(client, claim):
    with pytest.raises(ProtocolError, match=r"client 0: memory: expected at most \d+ bytes"):
        described(client, **claim)


def test_seconds_that_have_not_passed_do_not_count(client, caplog):
    link = described(client, seconds=1e6)
    assert 0 < link.traffic.client_seconds < 60
    assert "client 0 says it computed for 1e+06 s" in caplog.text
    honest = described(client)
    assert 0 < honest.traffic.client_seconds < 60
